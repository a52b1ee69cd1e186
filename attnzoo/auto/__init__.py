"""How ``auto`` selects a backend: by measurements that are valid in an environment, else by priority."""
