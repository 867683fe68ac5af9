"""How processes come to be, are watched, and end. Nothing here imports torch in the process that owns the others."""
