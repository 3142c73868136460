"""ModelConfig: the networks, by the names of RLlib's `DefaultModelConfig`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from training.settings import (
    Activation,
    ConvFilters,
    Count,
    ImportPath,
    Layers,
    PositiveCount,
    PositiveNumber,
    Section,
    Switch,
)

Initializer = Literal[
    "constant_",
    "dirac_",
    "eye_",
    "kaiming_normal_",
    "kaiming_uniform_",
    "normal_",
    "ones_",
    "orthogonal_",
    "sparse_",
    "trunc_normal_",
    "uniform_",
    "xavier_normal_",
    "xavier_uniform_",
    "zeros_",
]
"""Functions of `torch.nn.init` that change a tensor in place, which RLlib asks for; written out, as
a config is read without torch."""


class ModelConfig(Section):
    """The networks: a multilayer perceptron each for policy and value (RLlib's default modules).

    The names are those of RLlib's `DefaultModelConfig`.
    """

    fcnet_hiddens: Annotated[Layers, Field(min_length=1)] = (64, 64)
    """Units of each hidden layer. Two of 64 is the usual size for vector observations."""

    fcnet_activation: Activation = "tanh"
    """Activation of the hidden layers."""

    fcnet_use_layernorm: Switch = False
    """Put a layer norm behind each hidden layer."""

    fcnet_kernel_initializer: Initializer | None = None
    """A `torch.nn.init` name, e.g. "orthogonal_"; null is torch's default for linear layers."""

    fcnet_kernel_initializer_kwargs: dict[str, Any] | None = None
    """Arguments of the initializer, e.g. {"gain": 1.41}."""

    head_fcnet_hiddens: Layers = ()
    """Units of hidden layers of the policy's and value's own heads, behind `fcnet_hiddens`."""

    head_fcnet_activation: Activation = "relu"
    """Activation of the heads' hidden layers."""

    head_fcnet_use_layernorm: Switch = False
    """Put a layer norm behind each hidden layer of the heads."""

    head_fcnet_kernel_initializer: Initializer | None = None
    """A `torch.nn.init` name for the heads."""

    head_fcnet_kernel_initializer_kwargs: dict[str, Any] | None = None
    """Arguments of the heads' initializer."""

    vf_share_layers: Switch = False
    """Whether policy and value share their hidden layers. Separate needs no balance of losses."""

    free_log_std: Switch = False
    """Box actions: one learned deviation per action instead of one computed from the state."""

    log_std_clip_param: PositiveNumber = 20.0
    """Box actions: the log of the deviation is clipped to plus and minus this."""

    conv_filters: ConvFilters | None = None
    """Image observations: [[channels, kernel, stride], ...], one per convolution; kernel and stride
    are a number or [height, width]. Null takes RLlib's where it has some: for images of 10, 42, 64,
    84 or 96 pixels square."""

    conv_activation: Activation = "relu"
    """Image observations: activation of the convolutions."""

    use_lstm: Switch = False
    """Put an LSTM behind the hidden layers (or the convolutions): a policy with memory."""

    lstm_cell_size: PositiveCount = 64
    """Units of the LSTM, and numbers in each of its two states."""

    max_seq_len: Annotated[Count, Field(ge=2)] = 20
    """Steps that gradients go back through the LSTM. Batches are cut into sequences of this length,
    the last of each episode padded."""

    module: ImportPath | None = None
    """An RLModule class of your own, "module:Class", in place of RLlib's; it gets `module_config`
    and none of the settings above but `max_seq_len`."""

    module_config: dict[str, Any] = Field(default_factory=dict)
    """What an RLModule of your own finds in its `model_config`."""

    @model_validator(mode="after")
    def _own_module_has_own_settings(self) -> ModelConfig:
        own = {"module", "module_config", "max_seq_len"}
        if self.module is None:
            if self.module_config:
                raise ValueError(
                    "`model.module_config` is for an RLModule of your own: give `model.module` too"
                )
            return self
        changed = [
            name
            for name, field in type(self).model_fields.items()
            if name not in own and getattr(self, name) != field.default
        ]
        if changed:
            raise ValueError(
                f"`model.{changed[0]}` is for RLlib's own networks, and `model.module` names an "
                "RLModule of your own: put what it takes under `model.module_config`"
            )
        return self


class QModelConfig(ModelConfig):
    """The networks of DQN and SAC; wider, as their papers and Stable-Baselines3 have them."""

    fcnet_hiddens: Annotated[Layers, Field(min_length=1)] = (256, 256)
    """Units of each hidden layer."""

    fcnet_activation: Activation = "relu"
    """Activation of the hidden layers."""


class SACModelConfig(QModelConfig):
    """SAC's networks: with Box actions the Q-networks see the observation and the action apart."""

    fusionnet_hiddens: Layers = ()
    """Units of hidden layers that see both together, before the one that joins them. RLlib has two
    of 256 here, which take most of an update's time."""

    fusionnet_activation: Activation = "relu"
    """Activation of the layers that see both together."""
