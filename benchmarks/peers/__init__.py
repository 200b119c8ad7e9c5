"""Other frameworks doing the same jobs, each in a process and an environment of its own."""
