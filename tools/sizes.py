"""Sizes of Qwen2-shaped models, counted from their configuration: parameters, bytes. Standard
library only."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Model:
    """A Qwen2- or Llama-shaped decoder; parameters are counted, not looked up."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inter: int
    vocab: int
    tied: bool
    head_dim: int = 0
    bias: bool = True          # of the queries', keys' and values' maps: Qwen2 has them, Llama not

    @property
    def width(self):
        """Of a layer's queries."""
        return self.heads * (self.head_dim or self.hidden // self.heads)

    @property
    def kv_width(self):
        return self.width // self.heads * self.kv_heads

    @property
    def n_linear(self):
        """Parameters of the layers' linear maps, the biases of q, k and v included."""
        qkv = (self.hidden + self.bias) * (self.width + 2 * self.kv_width)
        return self.layers * (qkv + self.width * self.hidden + 3 * self.hidden * self.inter)

    @property
    def n_output(self):
        """Of the output layer, which is the embedding if tied."""
        return self.vocab * self.hidden

    @property
    def n_params(self):
        norms = (2 * self.layers + 1) * self.hidden
        return self.n_linear + norms + self.n_output * (1 if self.tied else 2)

    def frozen_bytes(self):
        """On a card: linear maps in bf16, embedding and norms in float32."""
        linear = self.n_linear + (0 if self.tied else self.n_output)
        return 2 * linear + 4 * (self.n_params - linear)

    def kv_bytes(self):
        """Of one token, bf16."""
        return 2 * 2 * self.layers * self.kv_width


KNOWN = {
    "SmolLM2-135M-Instruct": Model(576, 30, 9, 3, 1536, 49152, True, bias=False),
    "Qwen2.5-0.5B": Model(896, 24, 14, 2, 4864, 151936, True),
    "Qwen2.5-Math-1.5B": Model(1536, 28, 12, 2, 8960, 151936, True),
    "Qwen2.5-Math-7B": Model(3584, 28, 28, 4, 18944, 152064, False),
    "DeepSeek-R1-Distill-Qwen-1.5B": Model(1536, 28, 12, 2, 8960, 151936, False),
    "DeepSeek-R1-Distill-Qwen-7B": Model(3584, 28, 28, 4, 18944, 152064, False),
}


def find_model(name):
    """A known model by the end of its name, or a directory with config.json; None if neither."""
    config = Path(name) / "config.json"
    if not config.is_file():
        return KNOWN.get(Path(name).name)
    c = json.loads(config.read_text())
    head_dim = c.get("head_dim") or 0
    if head_dim * c["num_attention_heads"] == c["hidden_size"]:      # what it is when not given
        head_dim = 0
    return Model(c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"],
                 c["num_key_value_heads"], c["intermediate_size"], c["vocab_size"],
                 c.get("tie_word_embeddings", False), head_dim,
                 c.get("attention_bias", c.get("model_type", "qwen2") == "qwen2"))


def name_of(model) -> str:
    """The known model of these sizes; "" if there is none."""
    return next((name for name, known in KNOWN.items() if known == model), "")
