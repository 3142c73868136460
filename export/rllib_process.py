"""Ray and torch as the commands of this package need them."""

from __future__ import annotations

import logging
import warnings


def prepare_rllib() -> None:
    """Load Ray and torch as these commands need them; called before RLlib is imported.

    Ray's and RLlib's deprecation notices stay off the user's terminal (errors are raised). torch
    keeps to one thread: the networks answer single observations, for which a second thread only
    adds waiting, twentyfold where the machine is busy.
    """
    warnings.filterwarnings("ignore")
    import ray
    import torch

    torch.set_num_threads(1)
    # Ray gives its loggers their level while it is imported, so this comes after.
    for name in ("ray", "ray.rllib", *logging.root.manager.loggerDict):
        if name.split(".")[0] == "ray":
            logging.getLogger(name).setLevel(logging.ERROR)
    assert ray.__version__
