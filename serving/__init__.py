"""The bundle, the engines that run it, and the servers and clients around them."""
