"""What runs inside the peers' own virtual environments; imports nothing of this project."""
