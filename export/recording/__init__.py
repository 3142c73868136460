"""Videos of policies: frames from environments, panels drawn around them, files that play."""
