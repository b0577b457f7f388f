"""What `doctor.py` looks at; nothing here imports anything that may be broken."""
