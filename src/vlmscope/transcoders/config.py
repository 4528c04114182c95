"""Settings of a transcoder and of a set: plain records without torch, so that Hydra can register them."""

from dataclasses import dataclass

from vlmscope.core.errors import UserError

FORMAT_NAMES = ("vlmscope", "paper", "circuit_tracer", "clt", "gemma_scope", "sparsify", "sae_lens")  # of sets on disk
# The sites of transcoders in a model, and the tensors that those of a site read and imitate (docs/glossary.md).
HOOKS = {"decoder": ("mlp_in", "mlp_out"), "tower": ("tower_mlp_in", "tower_mlp_out")}
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

    @property
    def site(self) -> str:
        """The layers that the set belongs to, of `HOOKS`."""
        return "tower" if self.input_hook == HOOKS["tower"][0] else "decoder"
