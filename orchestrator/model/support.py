"""Whether an architecture can be passed in packed rows with the head taken apart.

No list of names: the model's own forward pass on single examples is compared with ours on a
packed row, once per store entry. What differs is refused by name.
"""

from typing import Any

import torch

from orchestrator.errors import ModelError
from orchestrator.model.base import wrap
from orchestrator.model.packed import hidden_states

_LENGTHS = (5, 9)


@torch.no_grad()
def check_architecture(model: Any) -> None:
    """Compare logits of our packed pass with the model's own pass, example by example.

    Raises:
        ModelError: the architecture gives other logits, or does not run, in packed rows.
    """
    name = type(model).__name__
    model.eval()
    device = model.get_input_embeddings().weight.device
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (sum(_LENGTHS),), generator=generator).to(device)
    base = wrap(model, "")
    try:
        with base.unpacked():
            own = torch.cat(
                [
                    model(input_ids=ids[None], use_cache=False).logits[0].float()
                    for ids in tokens.split(list(_LENGTHS))
                ]
            )
        with torch.enable_grad():
            # As training passes it.
            hidden = hidden_states(base, tokens, _LENGTHS).detach()
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise ModelError(f"{name} cannot be trained in packed rows: {error}") from error
    logits = base.head.scores(base.head.logits(hidden))
    difference = (logits - own).abs().max().item()
    allowed = 0.1 * own.abs().max().item() + 1e-3
    if not difference <= allowed:
        raise ModelError(
            f"{name} is not supported: its logits in a packed row differ from its own by "
            f"{difference:.3g} (allowed {allowed:.3g}). Llama, Mistral, Qwen, Gemma, Phi, GPT-NeoX "
            "and GPT-2 models are known to work"
        )
