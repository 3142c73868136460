"""DQN and SAC with a flat buffer of transitions and little around each gradient step."""
