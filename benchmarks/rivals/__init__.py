"""What `compare.py` is made of: the rivals, the faults, their cost, what they name, and the table of it all."""
