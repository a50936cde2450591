"""HPSv3 (arXiv 2508.03789): human preference score of an image and its caption, from a Qwen2-VL model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from scalewise.common.errors import first_line
from scalewise.metrics.base import Metric
from scalewise.metrics.extras import (
    Device,
    Extra,
    check_weights,
    explain_load_errors,
    load_image_processor,
    read_weights,
    select_part,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen2VLConfig, Qwen2VLModel

FILE = "HPSv3.safetensors"
REWARD, IMAGE = "<|Reward|>", "<|image_pad|>"
"""The token whose hidden state gives the score, and the placeholder of an image patch."""
PIXELS = 256 * 28 * 28
"""Approximate number of pixels after resizing; sides become multiples of 28."""

_EMBEDDING = "model.language_model.embed_tokens.weight"
_AUTHORS = "hpsv3/dataset/data_collator_qwen.py of github.com/MizzenAI/HPSv3"


@dataclass(frozen=True)
class Question:
    """Prompt template; the authors' text is not part of this package and is read from the weights' folder."""

    instruction: str
    """Instruction with {text_prompt} as the placeholder of the caption."""
    suffix: str
    """End of the prompt, with the reward token."""

    @classmethod
    def read(cls, file: Path) -> Question:
        """Read prompt.json; raise ValueError with the required format if it is invalid."""
        try:
            data = json.loads(file.read_text("utf-8"))
            question = cls(data["instruction"], data["suffix"])
            if question.format("a caption") == question.format("") or question.format("").count(REWARD) != 1:
                raise ValueError(f"it must contain {{text_prompt}}, and {REWARD} once")
        except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file} is not a valid prompt for HPSv3 ({type(error).__name__}: {first_line(error)}); "
                "write "
                f'{{"instruction": "... {{text_prompt}} ...", "suffix": "... {REWARD} ..."}} with the '
                f"INSTRUCTION and prompt_with_special_token of {_AUTHORS}."
            ) from error
        return question

    def format(self, caption: str) -> str:
        """Return the prompt for a caption."""
        return self.instruction.format(text_prompt=caption) + self.suffix


class Words:
    """Tokenizes the prompt for an image and its caption."""

    def __init__(self, question: Question, tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
        """Wrap a tokenizer; `template` replaces its chat template unless None."""
        self.question, self.tokenizer, self.template = question, tokenizer, template
        self.special_tokens = sorted(tokenizer.get_added_vocab())

    def __call__(self, caption: str, patches: int) -> tuple[Tensor, int]:
        """Return token ids [1, L] for an image of `patches` patches, and the position of the reward token.

        Raises ValueError if the caption contains a special token of the tokenizer.
        """
        for token in self.special_tokens:
            if token in caption:
                raise ValueError(
                    f"The caption {caption!r} contains {token}, a special token of HPSv3; remove it."
                )
        content = [{"type": "image"}, {"type": "text", "text": self.question.format(caption)}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=self.template, tokenize=False,
            add_generation_prompt=True,
        )  # fmt: skip
        tokens = self.tokenizer(text.replace(IMAGE, IMAGE * patches), return_tensors="pt").input_ids
        image, reward = self.tokenizer.convert_tokens_to_ids([IMAGE, REWARD])
        positions = (tokens[0] == reward).nonzero().flatten().tolist()
        if len(positions) != 1 or int((tokens == image).sum()) != patches:
            raise ValueError(f"the chat template must contain {IMAGE} and {REWARD} once each")
        return tokens, positions[0]


class HPSv3:
    """Predicts the preference score of an image and its caption, one image at a time."""

    def __init__(self, model: Qwen2VLModel, head: nn.Module, *, words: Words, processor: Any) -> None:
        """Wrap the model's parts; `head` maps a hidden state [D] to mean and deviation [2] in float32."""
        for part in (model, head):
            part.eval().requires_grad_(False)
        self.model, self.head, self.words, self.processor = model, head, words, processor

    @classmethod
    def load(cls, source: str, device: Device) -> HPSv3:
        """Load a folder with HPSv3.safetensors (or model*.safetensors), prompt.json and the base's files.

        The base's files are config.json, preprocessor_config.json and the tokenizer of
        Qwen/Qwen2-VL-7B-Instruct. The model is bfloat16 on CUDA and float32 elsewhere.
        """
        from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLModel

        folder = Path(source)
        for needed in ("config.json", "preprocessor_config.json", "prompt.json"):
            if not (folder / needed).exists():
                raise ValueError(
                    f"{source} has no {needed}; use a folder with {FILE}, prompt.json and all files of "
                    "Qwen/Qwen2-VL-7B-Instruct except its weights."
                )
        question = Question.read(folder / "prompt.json")
        found = _weights(folder)
        with explain_load_errors("HPSv3", source):
            config = Qwen2VLConfig.from_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            processor = load_image_processor(folder)
            tokenizer.add_tokens([REWARD], special_tokens=True)
            words = Words(question, tokenizer, _template(folder))
        if _EMBEDDING in found:
            # The authors truncated the embedding to the tokenizer's tokens plus the reward token.
            config.text_config.vocab_size = len(found[_EMBEDDING])
        _check_tokens(source, tokenizer, config)
        with explain_load_errors("HPSv3's chat template", source):
            words("a caption", 1)
        with torch.device("meta"):
            head = _head(config.text_config.hidden_size)
            parts = nn.ModuleDict({"model": Qwen2VLModel(config), "rm_head": head})
        check_weights("HPSv3", source, found, parts.state_dict())
        model = Qwen2VLModel.from_pretrained(
            None, config=config, state_dict=select_part("model", found),
            dtype=torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32,
        )  # fmt: skip
        state = {name: value.float() for name, value in select_part("rm_head", found).items()}
        head.load_state_dict(state, assign=True)
        return cls(model.to(device), head.to(device), words=words, processor=processor)

    @torch.no_grad()
    def extract(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return one value per image [N] for uint8 images [N, H, W, 3]; see `FeatureExtractor`."""
        scores = [self.score(image, caption)[0] for image, caption in zip(images, captions, strict=True)]
        return {"hpsv3": torch.stack(scores)}

    @torch.no_grad()
    def score(self, image: np.ndarray, caption: str) -> Tensor:
        """Return mean and deviation [2] of the score of a uint8 image [H, W, 3], float32 on the CPU."""
        device = self.model.device
        inputs = self.processor(
            images=[Image.fromarray(image)], return_tensors="pt",
            size={"shortest_edge": PIXELS, "longest_edge": PIXELS},
        )  # fmt: skip
        tokens, position = self.words(
            caption, int(inputs.image_grid_thw.prod()) // self.processor.merge_size**2
        )
        # The authors pass only embeddings to the language model, so positions count tokens within the image,
        # too. By default, transformers would use the rows and columns of image patches.
        positions = torch.arange(tokens.shape[1]).expand(3, 1, -1)
        hidden = self.model(
            input_ids=tokens.to(device), position_ids=positions.to(device), use_cache=False,
            pixel_values=inputs.pixel_values.to(device), image_grid_thw=inputs.image_grid_thw.to(device),
        ).last_hidden_state  # fmt: skip
        return self.head(hidden[0, position].float()).cpu()


def current_name(name: str) -> str:
    """Convert a published weight name (transformers 4.45) to the name in current transformers."""
    if name.startswith("visual."):
        return f"model.{name}"
    if name.startswith("model.") and not name.startswith(("model.visual.", "model.language_model.")):
        return name.replace("model.", "model.language_model.", 1)
    return name


def _weights(folder: Path) -> dict[str, Tensor]:
    """Read all weights except the language model head, by current names."""
    files = [folder / FILE] if (folder / FILE).exists() else sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder} has neither {FILE} nor model*.safetensors; copy {FILE} of MizzenAI/HPSv3 there."
        )
    loaded = [item for file in files for item in read_weights(file).items()]
    return {current_name(name): value for name, value in loaded if name != "lm_head.weight"}


def _template(folder: Path) -> str | None:
    """Read the chat template, which Qwen2-VL's processor stores in a separate file; None without that
    file.
    """
    file = folder / "chat_template.json"
    return json.loads(file.read_text("utf-8"))["chat_template"] if file.exists() else None


def _head(width: int) -> nn.Sequential:
    """Build the head that predicts mean and deviation of the score."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05),
        nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2),
    )  # fmt: skip


def _check_tokens(source: str, tokenizer: PreTrainedTokenizerBase, config: Qwen2VLConfig) -> None:
    """Raise ValueError if the tokenizer does not match the weights.

    If its files are missing, transformers silently builds a tokenizer with a few tokens.
    """
    words, rows = len(tokenizer), config.text_config.vocab_size
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    if not rows / 2 <= words <= rows or image != config.image_token_id:
        raise ValueError(
            f"The tokenizer in {source} has {words:,} tokens including {REWARD}, with id {image} for "
            f"{IMAGE}; "
            f"the model has {rows:,}, with id {config.image_token_id}. Copy all tokenizer files of "
            "Qwen/Qwen2-VL-7B-Instruct there."
        )


EXTRA = Extra(
    name="hpsv3", load=HPSv3.load,
    metrics=(Metric(
        name="hpsv3", title="HPSv3", better="higher", digits=2,
        statistic=lambda features: features.mean_output("hpsv3"),
        about="human preference for an image given its caption, predicted by a vision language model",
    ),),
)  # fmt: skip
