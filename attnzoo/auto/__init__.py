"""The backend ``auto``. It runs the model's code or a backend: by measurement, or else by rule and by priority."""
