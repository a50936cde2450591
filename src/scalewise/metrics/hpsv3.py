"""HPSv3 (arXiv 2508.03789): a Qwen2-VL that is asked what people would think of a picture for its caption."""

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
    below,
    check_weights,
    image_processor,
    loading,
    read_weights,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen2VLConfig, Qwen2VLModel

FILE = "HPSv3.safetensors"
REWARD, IMAGE = "<|Reward|>", "<|image_pad|>"
"""The token at which the score is read, and the one that stands for a part of the picture."""
PIXELS = 256 * 28 * 28
"""About what every picture is resized to, its sides to multiples of 28."""

_EMBEDDING = "model.language_model.embed_tokens.weight"
_AUTHORS = "hpsv3/dataset/data_collator_qwen.py of github.com/MizzenAI/HPSv3"


@dataclass(frozen=True)
class Question:
    """What the model is asked; the authors' wording is theirs and lies beside the weights."""

    instruction: str
    """Holds {text_prompt} in place of the caption."""
    suffix: str
    """Ends the question and holds the token at which the score is read."""

    @classmethod
    def read(cls, file: Path) -> Question:
        """Read prompt.json; ValueError tells what it has to hold."""
        try:
            given = json.loads(file.read_text("utf-8"))
            question = cls(given["instruction"], given["suffix"])
            if question.of("a caption") == question.of("") or question.of("").count(REWARD) != 1:
                raise ValueError(f"it lacks {{text_prompt}}, or has not one {REWARD}")
        except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file} is not what HPSv3 needs ({type(error).__name__}: {first_line(error)}); write "
                f'{{"instruction": "... {{text_prompt}} ...", "suffix": "... {REWARD} ..."}} with the '
                f"INSTRUCTION and prompt_with_special_token of {_AUTHORS}."
            ) from error
        return question

    def of(self, caption: str) -> str:
        """All that is asked about a picture of a caption."""
        return self.instruction.format(text_prompt=caption) + self.suffix


class Words:
    """Questions as tokens."""

    def __init__(self, question: Question, tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
        """`template` is the chat template, if it is not the tokenizer's own."""
        self.question, self.tokenizer, self.template = question, tokenizer, template
        self.marks = sorted(tokenizer.get_added_vocab())

    def __call__(self, caption: str, parts: int) -> tuple[Tensor, int]:
        """The question about a picture of so many parts, as ids [1, L], and where its score is read.

        ValueError if the caption holds what the tokenizer takes for a mark of its own.
        """
        for mark in self.marks:
            if mark in caption:
                raise ValueError(
                    f"The caption {caption!r} holds {mark}, a mark of HPSv3's tokenizer; leave it out."
                )
        content = [{"type": "image"}, {"type": "text", "text": self.question.of(caption)}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=self.template, tokenize=False,
            add_generation_prompt=True,
        )  # fmt: skip
        tokens = self.tokenizer(text.replace(IMAGE, IMAGE * parts), return_tensors="pt").input_ids
        image, reward = self.tokenizer.convert_tokens_to_ids([IMAGE, REWARD])
        places = (tokens[0] == reward).nonzero().flatten().tolist()
        if len(places) != 1 or int((tokens == image).sum()) != parts:
            raise ValueError(f"the chat template does not write {IMAGE} and {REWARD} once each")
        return tokens, places[0]


class Hpsv3:
    """The expected score of a picture for its caption; one picture goes through at a time."""

    def __init__(self, model: Qwen2VLModel, head: nn.Module, *, words: Words, processor: Any) -> None:
        """`head` turns a hidden state [D] into mean and deviation [2]; it computes in float32."""
        for part in (model, head):
            part.eval().requires_grad_(False)
        self.model, self.head, self.words, self.processor = model, head, words, processor

    @classmethod
    def load(cls, source: str, device: Device) -> Hpsv3:
        """Read a folder with HPSv3.safetensors (or model*.safetensors), prompt.json and the base's files.

        Those are config.json, preprocessor_config.json and the tokenizer of Qwen/Qwen2-VL-7B-Instruct. The
        model is bfloat16 on CUDA and float32 elsewhere.
        """
        from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLModel

        folder = Path(source)
        for needed in ("config.json", "preprocessor_config.json", "prompt.json"):
            if not (folder / needed).exists():
                raise ValueError(
                    f"{source} has no {needed}; give a folder with {FILE}, prompt.json and the files of "
                    "Qwen/Qwen2-VL-7B-Instruct but its weights."
                )
        question = Question.read(folder / "prompt.json")
        found = _weights(folder)
        with loading("HPSv3", source):
            config = Qwen2VLConfig.from_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            processor = image_processor(folder)
            tokenizer.add_tokens([REWARD], special_tokens=True)
            words = Words(question, tokenizer, _template(folder))
        if _EMBEDDING in found:
            # The authors cut the embedding to the tokenizer's words and their own one.
            config.text_config.vocab_size = len(found[_EMBEDDING])
        _check_tokens(source, tokenizer, config)
        with loading("HPSv3's chat template", source):
            words("a caption", 1)
        with torch.device("meta"):
            head = _head(config.text_config.hidden_size)
            parts = nn.ModuleDict({"model": Qwen2VLModel(config), "rm_head": head})
        check_weights("HPSv3", source, found, parts.state_dict())
        model = Qwen2VLModel.from_pretrained(
            None, config=config, state_dict=below("model", found),
            dtype=torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32,
        )  # fmt: skip
        state = {name: value.float() for name, value in below("rm_head", found).items()}
        head.load_state_dict(state, assign=True)
        return cls(model.to(device), head.to(device), words=words, processor=processor)

    @torch.no_grad()
    def look(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, Tensor]:
        """One value per image [N]; see `Examiner`."""
        scores = [self.judge(picture, caption)[0] for picture, caption in zip(images, captions, strict=True)]
        return {"hpsv3": torch.stack(scores)}

    @torch.no_grad()
    def judge(self, picture: np.ndarray, caption: str) -> Tensor:
        """Mean and deviation [2] of the score of bytes [H, W, 3], float32 on the CPU."""
        device = self.model.device
        seen = self.processor(
            images=[Image.fromarray(picture)], return_tensors="pt",
            size={"shortest_edge": PIXELS, "longest_edge": PIXELS},
        )  # fmt: skip
        tokens, place = self.words(caption, int(seen.image_grid_thw.prod()) // self.processor.merge_size**2)
        # The authors' forward hands the language model nothing but embeddings, so that its positions count
        # tokens, within the picture too; transformers' own would follow the picture's rows and columns.
        positions = torch.arange(tokens.shape[1]).expand(3, 1, -1)
        hidden = self.model(
            input_ids=tokens.to(device), position_ids=positions.to(device), use_cache=False,
            pixel_values=seen.pixel_values.to(device), image_grid_thw=seen.image_grid_thw.to(device),
        ).last_hidden_state  # fmt: skip
        return self.head(hidden[0, place].float()).cpu()


def todays(name: str) -> str:
    """The name that transformers has today for a weight that was published with those of its version 4.45."""
    if name.startswith("visual."):
        return f"model.{name}"
    if name.startswith("model.") and not name.startswith(("model.visual.", "model.language_model.")):
        return name.replace("model.", "model.language_model.", 1)
    return name


def _weights(folder: Path) -> dict[str, Tensor]:
    """All weights but the layer that would write text, by today's names."""
    files = [folder / FILE] if (folder / FILE).exists() else sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder} has neither {FILE} nor model*.safetensors; put MizzenAI/HPSv3's {FILE} there."
        )
    loaded = [item for file in files for item in read_weights(file).items()]
    return {todays(name): value for name, value in loaded if name != "lm_head.weight"}


def _template(folder: Path) -> str | None:
    """Qwen2-VL's processor has its chat template in a file of its own."""
    file = folder / "chat_template.json"
    return json.loads(file.read_text("utf-8"))["chat_template"] if file.exists() else None


def _head(width: int) -> nn.Sequential:
    """Mean and deviation of the score from a hidden state."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05),
        nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2),
    )  # fmt: skip


def _check_tokens(source: str, tokenizer: PreTrainedTokenizerBase, config: Qwen2VLConfig) -> None:
    """Hold the tokenizer against the weights: without its files one of a handful of words comes silently."""
    words, rows = len(tokenizer), config.text_config.vocab_size
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    if not rows / 2 <= words <= rows or image != config.image_token_id:
        raise ValueError(
            f"The tokenizer in {source} knows {words:,} tokens with {REWARD} and has number {image} for "
            f"{IMAGE}, the model {rows:,} and {config.image_token_id}; copy all tokenizer files of "
            "Qwen/Qwen2-VL-7B-Instruct there."
        )


EXTRA = Extra(
    name="hpsv3", load=Hpsv3.load,
    metrics=(Metric(
        name="hpsv3", title="HPSv3", better="higher", digits=2,
        statistic=lambda seen: seen.mean_look("hpsv3"),
        about="how much people would prefer a picture for its caption, as a vision language model tells",
    ),),
)  # fmt: skip
