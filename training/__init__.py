"""From an environment to RLlib checkpoints."""
