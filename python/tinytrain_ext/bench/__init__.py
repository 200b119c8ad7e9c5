"""`tinytrain bench`: the speed of this engine on the machine it runs on, with NumPy alone."""
