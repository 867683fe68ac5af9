"""What a response is worth. Rewards run where rank 0 runs and import no torch."""
