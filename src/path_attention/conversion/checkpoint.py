"""Checkpoints of the families: found, read tensor by tensor with every one accounted for, and written."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from path_attention.conversion.families import FLA, OWN, ROPE_FAMILIES, Family, family
from path_attention.models import PaTHConfig, PaTHForCausalLM

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
# Where a model is written before its files are moved to their place.
PARTIAL = "partial-*"
# What a tokenizer may consist of, in transformers' and sentencepiece's formats.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
# The file that says what a tokenizer is: of the tokenizers library, of sentencepiece, of the first byte-level BPEs.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_HEAD, _EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def find(source: str | Path) -> Path:
    """The folder of a checkpoint: ``source`` itself, or what the Hugging Face hub has by that name, fetched.

    Raises:
        FileNotFoundError: neither.
    """
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder}: no checkpoint here; wanted a folder with config.json and safetensors")
        return folder
    from huggingface_hub import snapshot_download

    patterns = ["config.json", GENERATION, "*.safetensors", INDEX, "README.md", *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except Exception as error:  # no such name, no network, no permission: all that can be said is what the hub said
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{source}: neither a folder nor to be had from the Hugging Face hub ({reason})"
        ) from error


def is_rope(folder: Path) -> bool:
    """Whether a checkpoint is of a family of RoPE models."""
    return _object(folder / "config.json").get("model_type") in ROPE_FAMILIES


def _object(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object, or a ValueError that names it."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: got {type(found).__name__}; wanted an object")
    return found


class Checkpoint:
    """A folder of config.json and safetensors, whole or in shards, whose tensors are read when they are asked for.

    Args:
        folder: as :func:`find` gives it.

    Raises:
        ValueError, FileNotFoundError: a family that is not known, a configuration that our models cannot have, a shard
            that is missing, cut off or not what the index says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        raw = _object(folder / "config.json")
        with _named(folder / "config.json"):
            self.family: Family = family(raw.get("model_type"))
            # transformers' own classes know the defaults of what the file leaves out.
            settings = raw if self.family in (OWN, FLA) else AutoConfig.from_pretrained(folder).to_dict()
            self.fields = self.family.read(settings)
            mixer = {} if self.family in (OWN, FLA) else {"mixer": "rope"}
            self.config = PaTHConfig(**(self.fields | mixer))
        dtype = settings.get("dtype") or settings.get("torch_dtype")
        self.dtype: torch.dtype = getattr(torch, str(dtype).removeprefix("torch."), torch.float32)
        self._files = self._list()
        if (folder / GENERATION).is_file():  # copied in the end; that it can be read is seen now
            _object(folder / GENERATION)
            with _named(folder / GENERATION):
                GenerationConfig.from_pretrained(folder)

    def _list(self) -> dict[str, Path]:
        """The file of every tensor."""
        index = self.folder / INDEX
        if index.is_file():
            listed: Mapping[str, str] = _object(index).get("weight_map", {})
            if not (isinstance(listed, dict) and listed and all(isinstance(name, str) for name in listed.values())):
                raise ValueError(f"{index}: wanted a weight_map, the file of every tensor")
            files = {self.folder / name for name in listed.values()}
        elif (self.folder / WEIGHTS).is_file():
            listed, files = {}, {self.folder / WEIGHTS}
        else:
            raise FileNotFoundError(f"{self.folder}: no weights here; wanted {WEIGHTS}, or shards and {INDEX}")
        found: dict[str, Path] = {}
        for file in sorted(files):
            if not file.is_file():
                raise FileNotFoundError(f"{file}: missing; {INDEX} names it")
            try:
                with safe_open(str(file), "pt") as opened:
                    names = list(opened.keys())
            except SafetensorError as error:
                raise ValueError(f"{file}: cut off, or no safetensors file: {error}") from error
            for name in names:
                if name in found:
                    raise ValueError(f"{file}: tensor {name} is in {found[name].name} too")
                found[name] = file
        for name in listed.keys() ^ found.keys() if listed else ():
            where = "in no shard" if name in listed else f"not in {INDEX}"
            raise ValueError(f"{self.folder}: tensor {name} is {where}")
        return found

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by the family's name, file by file."""
        for file in dict.fromkeys(self._files.values()):
            with safe_open(str(file), "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it has no iteration)
                    yield name, opened.get_tensor(name)

    def load(self, config: PaTHConfig | None = None, dtype: torch.dtype | None = None) -> PaTHForCausalLM:
        """The model of the checkpoint, every tensor accounted for.

        Args:
            config: ours; None means :attr:`config`.
            dtype: of the weights; None means the checkpoint's.

        Raises:
            ValueError: naming a tensor that the model lacks or that the checkpoint lacks, or one of another shape, of
                no floating dtype, or with values that are not finite.
        """
        model = on_meta(self.config if config is None else config)
        wanted = {name: parameter.shape for name, parameter in model.state_dict().items()}
        tied = bool(model.config.tie_word_embeddings)
        found: dict[str, Tensor] = {}
        for theirs, tensor in self.tensors():
            name = self.family.ours(theirs)
            if name is None and self.family.is_dropped(theirs):
                continue
            if name is None or name not in wanted:
                raise ValueError(f"{self.folder}: got tensor {theirs}, which a {self.family.name} of this config lacks")
            if name.endswith(self.family.depthwise) and tensor.dim() == 3 and tensor.shape[1] == 1:
                tensor = tensor.squeeze(1)
            self._check(theirs, tensor, wanted[name])
            found[name] = tensor.to(dtype or tensor.dtype)
        if tied:
            self._check_tied(found)
        for name in wanted:
            if name not in found:
                raise ValueError(f"{self.folder}: tensor {self.family.theirs(name)} is missing")
        model.load_state_dict(found, assign=True)
        model.tie_weights()
        return model

    def _check(self, name: str, tensor: Tensor, shape: torch.Size) -> None:
        if tensor.shape != shape:
            raise ValueError(f"{self.folder}: tensor {name}: got shape {tuple(tensor.shape)}; wanted {tuple(shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{self.folder}: tensor {name}: got dtype {tensor.dtype}; wanted a floating one")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{self.folder}: tensor {name}: got values that are not finite")

    def _check_tied(self, found: dict[str, Tensor]) -> None:
        """A head that is the embeddings by config.json need not be there; where it is, it must be them."""
        head = found.pop(_HEAD, None)
        if _EMBEDDINGS in found:
            if head is not None and not torch.equal(head, found[_EMBEDDINGS]):
                raise ValueError(
                    f"{self.folder}: tensor {self.family.theirs(_HEAD)} is not the embeddings, to which config.json "
                    "ties it (tie_word_embeddings)"
                )
            found[_HEAD] = found[_EMBEDDINGS]


def on_meta(config: PaTHConfig) -> PaTHForCausalLM:
    """The model without memory, to be given its weights."""
    with torch.device("meta"):
        return PaTHForCausalLM(config)


def check_target(target: Path, begun: str = PARTIAL) -> None:
    """Raise a FileExistsError if something is there that a model would be written over; nothing is ever overwritten.

    Args:
        target: the folder.
        begun: pattern of what an interrupted writing of ours leaves: there, files are ours to write again.
    """
    if (target / "config.json").exists():
        raise FileExistsError(f"{target}: holds a model already; wanted a new folder")
    for place in (target, *target.parents):
        if place.exists() and not place.is_dir():
            raise FileExistsError(f"{place}: a file; wanted a folder")
    if target.is_dir() and not any(target.glob(begun)):
        for name in ("README.md", GENERATION, WEIGHTS, INDEX, *TOKENIZER_FILES):
            if (target / name).exists():
                raise FileExistsError(f"{target / name}: exists, and would be overwritten; wanted a new folder")


def write(
    model: PaTHForCausalLM,
    target: Path,
    *,
    source: Path | None = None,
    to: str = OWN.name,
    card: str = "",
    begun: str = PARTIAL,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a folder that transformers loads: config.json comes last, so that a folder with one is whole.

    Args:
        model: the model.
        target: the folder.
        source: folder whose tokenizer and generation config go along.
        to: the family to write, a name of :data:`FAMILIES`; by default ours.
        card: text of README.md.
        begun: as :func:`check_target` takes it.
        max_shard_size: as transformers' save_pretrained takes it.

    Raises:
        FileExistsError: see :func:`check_target`.
        ValueError: the family cannot say what the model is, by field or by tensor.
    """
    check_target(target, begun)
    chosen = family(to)
    config = chosen.write(model.config)
    target.mkdir(parents=True, exist_ok=True)
    for cut_off in target.glob(PARTIAL):
        shutil.rmtree(cut_off)
    partial = target / PARTIAL.replace("*", uuid.uuid4().hex)
    try:
        model.save_pretrained(partial, state_dict=_translated(model, chosen), max_shard_size=max_shard_size)
        if chosen is not OWN:
            dtype = str(model.dtype).removeprefix("torch.")
            named = {"architectures": [chosen.architecture], "model_type": chosen.name, "dtype": dtype}
            (partial / "config.json").write_text(json.dumps(named | config, indent=2) + "\n")
        for name in (GENERATION, *TOKENIZER_FILES) if source is not None else ():
            if (source / name).is_file():  # type: ignore[operator]
                shutil.copyfile(source / name, partial / name)  # type: ignore[operator]
        if card:
            (partial / "README.md").write_text(card, encoding="utf-8")
        for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, target / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _translated(model: PaTHForCausalLM, chosen: Family) -> dict[str, Tensor]:
    """The state of a model by the family's names."""
    state: dict[str, Any] = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop(_HEAD)
    translated = {}
    for name, tensor in state.items():
        theirs = chosen.theirs(name)
        if theirs is None:
            raise ValueError(f"{name}: a {chosen.name} has no such tensor")
        translated[theirs] = tensor.unsqueeze(1) if name.endswith(chosen.depthwise or ("\0",)) else tensor
    return translated


class _named:
    """Errors of a configuration, the strict dataclasses' own among them, as ValueErrors that name the file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception):
            raise ValueError(f"{self.file}: {' '.join(str(error).split())}") from error
