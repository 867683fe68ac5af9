"""What a response is worth. Rewards run in processes of their own, away from the trainer, and import no torch."""
