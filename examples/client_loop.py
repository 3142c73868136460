"""Step an environment against a served policy: python examples/client_loop.py URL [ENV_ID]."""

import sys

import gymnasium as gym

from serving.client import PolicyClient


def main() -> None:
    """Play one episode and print its return."""
    url = sys.argv[1]
    env = gym.make(sys.argv[2] if len(sys.argv) > 2 else "CartPole-v1")
    episode_return = 0.0
    with PolicyClient(url) as policy:
        observation, _ = env.reset(seed=0)
        while True:
            action = policy.compute_action(observation)
            observation, reward, terminated, truncated, _ = env.step(action)
            episode_return += float(reward)
            if terminated or truncated:
                break
    env.close()
    print(f"return {episode_return:.1f}")


if __name__ == "__main__":
    main()
