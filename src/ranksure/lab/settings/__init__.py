"""What claims are measured on: models and data made ready, trained, and found again on disk."""
