"""Lightning's .ckpt: a file of torch.save, of which weights, global_step and optimizers are of use here."""

from typing import Any

VERSION_KEY = "pytorch-lightning_version"
# The rest (loops, callbacks, hyper-parameters) has counters and tensors of its own, which are no weights.
_KEYS = ("state_dict", "global_step", "optimizer_states")


def weights_and_steps(loaded: Any) -> Any:
    """What a checkpoint of Lightning holds that is of use; anything else as it is."""
    if isinstance(loaded, dict) and VERSION_KEY in loaded and "state_dict" in loaded:
        return {key: loaded[key] for key in _KEYS if key in loaded}
    return loaded
