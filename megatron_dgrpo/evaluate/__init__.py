"""How good the student is: held-out prompts with rewards."""
