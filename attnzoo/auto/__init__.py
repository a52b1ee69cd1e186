"""Selection of a backend: measurements, the environment they hold in, and what ``auto`` takes."""
