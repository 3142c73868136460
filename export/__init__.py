"""From an RLlib checkpoint to a bundle that was shown to act as RLlib does."""
