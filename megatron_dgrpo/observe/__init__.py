"""What a run tells about itself: metrics.jsonl, the console, where the time goes. Imports no torch."""
