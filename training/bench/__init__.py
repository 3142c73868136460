"""`make bench-training`: training's speed beside plain RLlib's and Stable-Baselines3's."""
