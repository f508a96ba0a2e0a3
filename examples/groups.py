"""Ask a stage whose groups are weighed for every sample, with transformers and PEFT alone.

    python examples/groups.py FOLDER MODEL QUESTION [PICTURE]

FOLDER is what `dymoe export RUN --as groups` wrote: a LoRA for each group and the selector that weighs them, of the
prompt alone. MODEL is the base model of the groups, a folder or a Hub id ("pocket" is put together by dymoe).
"""

import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor


class Groups:
    """A model with a LoRA for each group, and the selector that weighs them."""

    def __init__(self, folder, base):
        facts = json.loads(Path(folder, "groups.json").read_text(encoding="utf-8"))
        self.selector, self.options = facts["selector"], facts["groups"][-1]["options"]
        self.names = [group["folder"] for group in facts["groups"]]
        self.tensors = load_file(Path(folder, "selector.safetensors"))
        first, *later = self.names
        self.model = PeftModel.from_pretrained(base, Path(folder, first), adapter_name=first)
        for name in later:
            self.model.load_adapter(Path(folder, name), adapter_name=name)
        self.model.base_model.set_adapter(self.names, inference_mode=True)
        self.model.eval()

    def generate(self, inputs, **options):
        """Weigh the groups for one prompt, then let the model answer it."""
        self.activate(self.weights(inputs))
        return self.model.generate(**inputs, **options)

    def activate(self, weights):
        """Scale every group's LoRA by its weight."""
        for layer in self.model.modules():
            if isinstance(layer, LoraLayer):
                for name, weight in zip(self.names, weights):
                    layer.set_scale(name, weight)

    @torch.no_grad()
    def weights(self, inputs):
        """The weight of every group for one prompt without padding."""
        states = {}
        decoder = self.model.get_base_model().get_decoder()
        hooks = [
            decoder.register_forward_pre_hook(
                lambda module, args, kwargs: states.update(entering=kwargs["inputs_embeds"][0]), with_kwargs=True
            ),
            decoder.register_forward_hook(
                lambda module, args, output: states.update(leaving=output.last_hidden_state[0])
            ),
        ]
        try:
            with self.model.disable_adapter():
                self.model(**inputs, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        select = {"keys": self.by_keys, "prototypes": self.by_prototypes}[self.selector]
        return select(states["entering"].float(), states["leaving"][-1].float())

    def by_keys(self, entering, leaving):
        """ProgLoRA: softmax of the groups' keys times the transformed maximum over the prompt's embeddings."""
        last = {kind: self.tensors[f"{self.names[-1]}.{kind}"] for kind in ("down", "up", "norm_weight", "norm_bias")}
        keys = torch.stack([self.tensors[f"{name}.key"] for name in self.names])
        query = F.silu(last["up"] @ (last["down"] @ entering.amax(0)))
        query = F.layer_norm(query, query.shape, last["norm_weight"], last["norm_bias"])
        return torch.softmax(keys @ query / math.sqrt(len(query)), 0).tolist()

    def by_prototypes(self, entering, leaving):
        """The task router: the nearest class mean, by one covariance, of the last token's state without any group."""
        fitted = [name for name in self.names if f"{name}.means" in self.tensors]
        if len(self.names) < 2 or not fitted:
            return [1.0] * len(self.names)
        means, scatter, counts = (
            [self.tensors[f"{name}.{kind}"].double() for name in fitted] for kind in ("means", "scatter", "counts")
        )
        owners = [self.names.index(name) for name, rows in zip(fitted, means) for _ in rows]
        means = torch.cat(means)
        covariance = sum(scatter) / max(float(torch.cat(counts).sum()) - len(means), 1.0)
        variances = covariance.diagonal()
        least = 1e-6 * float(variances.mean()) or 1.0
        shrinkage = self.options["shrinkage"]
        covariance = (1 - shrinkage) * covariance + shrinkage * torch.diag(variances.clamp(min=least))
        solved = torch.linalg.solve(covariance, means.T)
        nearest = leaving.double() @ solved - 0.5 * (means * solved.T).sum(1)
        owner = owners[int(nearest.argmax())]
        earlier = self.options["reach"] == "earlier"
        return [float(number == owner or (earlier and number < owner)) for number in range(len(self.names))]


def load_base(name):
    """Model and processor of the base."""
    if name == "pocket":
        from dymoe.models import load

        lvlm = load(name)
        return lvlm.model, lvlm.processor
    return AutoModelForImageTextToText.from_pretrained(name), AutoProcessor.from_pretrained(name)


def prompt(processor, question, picture=None):
    """The model's inputs for one question about one picture, or about none."""
    parts = [] if picture is None else [{"type": "image", "image": Image.open(picture).convert("RGB")}]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(messages, **how)


if __name__ == "__main__":
    folder, base, *asked = sys.argv[1:]
    model, processor = load_base(base)
    groups = Groups(folder, model)
    inputs = prompt(processor, *asked).to(model.device, model.dtype)
    answer = groups.generate(inputs, max_new_tokens=64, do_sample=False)
    for name, weight in zip(groups.names, groups.weights(inputs)):
        print(f"{name} {weight:.3f}", file=sys.stderr)
    print(processor.tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
