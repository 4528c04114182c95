"""Settings of a transcoder and of a set: plain records without torch, so that Hydra can register them."""

from dataclasses import dataclass

from vlmscope.core.errors import UserError

FORMAT_NAMES = ("vlmscope", "paper", "circuit_tracer", "clt", "gemma_scope", "sparsify", "sae_lens")  # of sets on disk
ACTIVATIONS = ("topk", "batchtopk", "jumprelu", "relu")  # the nonlinearities, in `vlmscope.transcoders.nonlinearities`


@dataclass(frozen=True)
class TranscoderConfig:
    """One layer's transcoder.

    `d_model` is the width of input and output, `n_features` the number of latents, `k` how many may be active at a
    token (the target of training if the activation does not fix the number). `bandwidth` is the width of JumpReLU's
    kernel, which only training uses. `writes` counts the layers that a feature writes to, its own included; more than
    one makes the transcoder cross-layer. The hooks name the tensors that it reads and imitates (`docs/glossary.md`).
    """

    d_model: int
    n_features: int
    k: int
    layer: int = 0
    activation: str = "topk"
    skip: bool = False
    input_hook: str = "mlp_in"
    output_hook: str = "mlp_out"
    bandwidth: float = 0.05
    writes: int = 1

    def __post_init__(self) -> None:
        if self.d_model < 1 or self.n_features < 1:
            raise UserError(
                f"transcoder of layer {self.layer}: d_model {self.d_model} and n_features {self.n_features} must be "
                "positive; correct the configuration"
            )
        if self.writes < 1:
            raise UserError(
                f"transcoder of layer {self.layer}: it writes to {self.writes} layers; it must write to one"
            )
        if not 1 <= self.k <= self.n_features:
            raise UserError(
                f"transcoder of layer {self.layer}: k = {self.k} must lie between 1 and n_features = "
                f"{self.n_features}; choose another k or width"
            )


@dataclass(frozen=True)
class TranscoderSetConfig:
    """What all transcoders of a set share. `n_model_layers` counts all layers of the model, trained or not."""

    n_model_layers: int
    k: int
    activation: str = "topk"
    model_name: str = ""
    input_hook: str = "mlp_in"
    output_hook: str = "mlp_out"
