"""Train a compressed Qwen2.5-Omni variant, evaluate it, save it and show it.

    python train_compress.py                                          # real speech, the small model, on a CPU
    python train_compress.py --compressor conv:osum                   # another method, another paper's setting
    python train_compress.py --compressor pooling --keep-ratio 0.25 --train adapter
    python train_compress.py longvale.yaml --keep-ratio 0.5           # a YAML or JSON file < the command line
    torchrun --nproc-per-node 2 train_compress.py longvale.yaml       # as any Trainer script

Every field of transformers' TrainingArguments is an option too. Results go to --output-dir (runs/ by default).
"""

import sys
from pathlib import Path

# This folder holds packages named `kernels` and `compression`; a PyPI package and a module of the standard library have
# the same names, and Python puts a script's folder first. Nothing here is imported from it.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import dataclasses
import difflib
import importlib.util
import json
import logging
import os
import statistics
import time
from argparse import Action, ArgumentParser
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import transformers
import yaml
from tqdm import tqdm
from transformers import HfArgumentParser, TrainingArguments

import audiopress
from audiopress.benchmarks.environment import environment, peak_memory
from audiopress.benchmarks.report import draw, row, table
from audiopress.benchmarks.scoring import evaluate, to_device, usable, with_other_audio
from audiopress.compression import Compressor
from audiopress.compression.base import LLMShape
from audiopress.data.collator import Encoder, OmniCollator, RecordDataset
from audiopress.data.longvale import load_dialogues
from audiopress.data.mixing import mix
from audiopress.data.records import Record
from audiopress.data.skips import SkipLog
from audiopress.data.speech import LANGUAGES, folder_records, speech_records
from audiopress.models import CompressedOmni, storage
from audiopress.models.encoders import hidden_audio
from audiopress.models.loading import build_for, has_random_projector
from audiopress.models.omni import TRAINABLE, check_video_compressor, shrunk, tokens_left
from audiopress.models.packages import FetchError
from audiopress.models.training import (
    CompressTrainer,
    RunCallback,
    StepCallback,
    fit_speech_rate,
    last_checkpoint,
    warm_up,
)

log = logging.getLogger("train_compress")

SPEECH = "speech"
# What makes a first run on speech a matter of minutes; for other data the defaults below are the owner's recipe.
FIRST_RUN = {
    "learning_rate": 1e-3,
    "max_steps": 32,
    "warmup_steps": 3,
    "per_device_train_batch_size": 8,
    "logging_steps": 1,
    "eval_steps": 16,
    "save_strategy": "no",
}
ANY_SHAPE = LLMShape(4, 2, 16, 128, 1e6, (2, 3, 3))  # to check options before a model is opened
CTC_WARMUP_STEPS = 300  # of 16 utterances, measured: at 150 the LLM hears little yet


@dataclass
class ModelArguments:
    """What is trained."""

    model: str = field(
        default="omni-small",
        metadata={"help": "omni-small, omni-small:unaligned, omni-small:hub, or path or hub name of Qwen2.5-Omni."},
    )
    compressor: str = field(default="pooling", metadata={"help": "NAME, NAME:PRESET or NAME+NAME; see the README."})
    keep_ratio: str | None = field(
        default=None,
        metadata={
            "help": "Tokens out / in, in (0, 1]; or several, as 0.5,0.25,0.125: every batch in training draws one, and "
            "the variant serves all of them. Default: the method's or preset's own."
        },
    )
    compressor_options: list[str] = field(
        default_factory=list, metadata={"help": "Options of the method, as KEY=VALUE.", "nargs": "*"}
    )
    video_compressor: str | None = field(
        default=None, metadata={"help": "A training-free method for the video tokens: uniform-stride, random, ..."}
    )
    video_keep_ratio: float | None = field(default=None, metadata={"help": "Its tokens out / in."})
    train: list[str] = field(
        default_factory=lambda: ["auto"],
        metadata={
            "help": "compressor, adapter (LoRA on the LLM), projector (the tower's last layer), several, or auto: "
            "compressor where it has parameters, adapter, and projector where the model comes with a random one; or "
            "none: a training-free method is evaluated as it is.",
            "nargs": "+",
        },
    )
    lora_r: int = 16
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    ctc_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of CTC between audio tokens and answer. Default: 0.5 for transcription, else 0."},
    )
    ctc_warmup_steps: int | None = field(
        default=None,
        metadata={
            "help": "Before the training proper, train compressor and projector by CTC alone for so many steps, "
            f"without running the LLM. Default: {CTC_WARMUP_STEPS} for transcription, else 0."
        },
    )
    speech_rate_steps: int = field(
        default=300,
        metadata={"help": "On transcribed speech, fit the rate predictor of qformer:mms-llama first."},
    )
    positions: Literal["original", "contiguous"] = "original"


@dataclass
class DataArguments:
    """What it is trained on."""

    data: str = field(default=SPEECH, metadata={"help": "speech, or a LongVALE dialogue file (JSON)."})
    speech_dir: str | None = field(
        default=None, metadata={"help": "Your own speech instead of the packaged: x.wav + x.txt, or *.trans.txt."}
    )
    languages: list[str] = field(
        default_factory=lambda: ["en"], metadata={"help": f"Of {', '.join(LANGUAGES)}.", "nargs": "+"}
    )
    min_words: int = field(default=1, metadata={"help": "Shorter utterances are left out."})
    max_utterance_seconds: float | None = field(
        default=6.0, metadata={"help": "Longer utterances of the packaged speech are left out."}
    )
    mix_matching: float = field(
        default=0.0, metadata={"help": "Share of records with sound and video to ask whether the two belong together."}
    )
    mix_joined: float = field(
        default=0.0, metadata={"help": "Share of records with video alone to join with one of sound alone."}
    )
    eval_data: str | None = field(default=None, metadata={"help": "Held-out dialogues. Default: the last 5 %%."})
    video_dir: str | None = None
    audio_dir: str | None = field(default=None, metadata={"help": "Extracted audio; default: the videos' own."})
    turns: Literal["multi", "single", "mixed"] = "multi"
    time_format: Literal["percent", "decimal"] = "percent"
    num_frames: int = 50
    max_length: int | None = field(default=None, metadata={"help": "Tokens the LLM reads; later rounds are dropped."})
    cache_audio: bool | None = field(
        default=None,
        metadata={
            "help": "Run the frozen audio tower once per clip and keep its states in memory (0.4 GB per hour of audio "
            "with omni-small). Default: for transcription."
        },
    )
    max_audio_seconds: float | None = field(default=None, metadata={"help": "Cut longer audio. Default: an error."})
    timestamps: int = field(
        default=0, metadata={"help": "Parts of a clip to tell apart by text between its tokens: percents. 0: none."}
    )
    max_eval_records: int = field(default=48, metadata={"help": "Held-out records evaluated at the end."})
    strict: bool = field(default=False, metadata={"help": "An unusable record is an error instead of a counted skip."})


@dataclass
class RunArguments(TrainingArguments):
    """transformers' own, with the owner's recipe as defaults."""

    output_dir: str = field(default="", metadata={"help": "Default: runs/COMPRESSOR."})
    per_device_train_batch_size: int = 1
    per_device_eval_batch_size: int = 16
    learning_rate: float = field(default=1e-4, metadata={"help": "Of the adapter. For packaged speech: 1e-3."})
    connector_learning_rate: float = field(default=3e-4, metadata={"help": "Of compressor and projector."})
    warmup_learning_rate: float = field(default=2e-3, metadata={"help": "Of both in the warm-up by CTC."})
    num_train_epochs: float = 2
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03
    weight_decay: float = 0.0
    logging_steps: float = 10
    eval_strategy: str = "steps"
    eval_steps: float | None = 500
    save_steps: float = 500
    save_total_limit: int | None = 2
    remove_unused_columns: bool = False
    prediction_loss_only: bool = True
    disable_tqdm: bool | None = False
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)
    resume: bool = field(default=False, metadata={"help": "Go on from the last complete checkpoint in output_dir."})
    shrink_steps: int = field(
        default=0, metadata={"help": "Over so many first steps the keep ratio falls from 1 to its own, by a cosine."}
    )
    show_layout: bool = field(default=False, metadata={"help": "Print the token tree before and after, and stop."})
    max_new_tokens: int = field(default=24, metadata={"help": "Of an answer in the evaluation."})


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, RunArguments]:
    """Reads `[file.yaml|file.json] [--option value ...]`; the command line wins over the file.

    Raises:
        ValueError: the file is unreadable or has a key that does not exist.
    """
    parser = HfArgumentParser((ModelArguments, DataArguments, RunArguments), usage=__doc__)
    gpu = torch.cuda.is_available() and not {"--use_cpu", "--use-cpu"} & set(argv)
    parser.set_defaults(
        bf16=gpu and torch.cuda.is_bf16_supported(),  # where the device has it
        gradient_checkpointing=gpu or None,  # memory is short there, time is short on a CPU
        report_to="tensorboard" if importlib.util.find_spec("tensorboard") else "none",
    )
    config: dict[str, Any] = {}
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        config = read_config(Path(argv[0]), {action.dest: action for action in parser._actions})
        argv = argv[1:]
    data = ArgumentParser(add_help=False, allow_abbrev=False)
    data.add_argument("--data", default=config.get("data", SPEECH))
    if data.parse_known_args(argv)[0].data == SPEECH:
        parser.set_defaults(**FIRST_RUN)
    parser.set_defaults(**{key: None for key, value in config.items() if value is None})
    argv = [text for key, value in config.items() for text in as_arguments(key, value)] + argv
    model_args, data_args, args = parser.parse_args_into_dataclasses(argv)
    args.output_dir = args.output_dir or str(Path("runs", model_args.compressor.replace(":", "-")))
    return model_args, data_args, args


def as_arguments(key: str, value: Any) -> list[str]:
    """Gives a config file's entry as it would stand on the command line, so that it is checked in the same way."""
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"]


def read_config(path: Path, valid: dict[str, Action]) -> dict[str, Any]:
    """Reads a YAML or JSON file of options; raises ValueError for a key that is not in `valid`."""
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"config {path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config {path} must hold `key: value` lines, got {type(values).__name__}")
    for key, value in values.items():
        if key in valid and isinstance(value, list) and valid[key].nargs not in ("*", "+"):
            raise ValueError(f"config {path}: {key} takes one value, got {value}")
        if key not in valid:
            close = difflib.get_close_matches(str(key), valid, n=3)
            raise ValueError(
                f"config {path} has an unknown key {key!r}; "
                + (f"did you mean {' or '.join(close)}?" if close else "see --help for all")
            )
    return values


def method_options(args: ModelArguments, shrink_steps: int) -> tuple[dict[str, Any], tuple[float, ...]]:
    """Gives the compressor's options that were asked for, and its ratios; checks both by building without memory.

    Raises:
        ValueError: an unknown method, preset or option, a value that is not allowed, several ratios for a method that
            has weights of its own for each, or a video method that cannot be.
    """
    options: dict[str, Any] = {}
    for text in args.compressor_options:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--compressor-options takes KEY=VALUE, got {text!r}")
        options[key] = yaml.safe_load(value)
    try:
        ratios = tuple(float(x) for x in str(args.keep_ratio).split(",")) if args.keep_ratio is not None else ()
    except ValueError:
        raise ValueError(f"--keep-ratio takes a number, or several as 0.5,0.25, got {args.keep_ratio!r}") from None
    if ratios:
        options["keep_ratio"] = ratios[0]
    with torch.device("meta"):
        made = audiopress.build(args.compressor, hidden_size=64, encoder_size=64, llm=ANY_SHAPE, **options)
        if args.train == ["none"] and made.trained:
            raise ValueError(f"--train none is for training-free methods; {args.compressor} has weights to train")
        for ratio in ratios[1:]:
            made.at(ratio)
        if shrink_steps:
            check_shrinking(made, ratios or (made.config.keep_ratio,), shrink_steps)
        if args.video_compressor is not None:
            video = audiopress.build(args.video_compressor, hidden_size=64, **video_options(args))
            check_video_compressor(video, made, 64)
    if args.video_compressor is None and args.video_keep_ratio is not None:
        raise ValueError("--video-keep-ratio needs a --video-compressor")
    return options, ratios


def check_shrinking(made: Compressor, ratios: tuple[float, ...], steps: int) -> None:
    """Raises ValueError unless a method can have all ratios from 1 down to `ratios`."""
    if steps < 0:
        raise ValueError(f"--shrink-steps must be >= 0, got {steps}")
    if min(ratios) == 1:
        raise ValueError(f"--shrink-steps needs a keep ratio below 1 to shrink to; that of {made.name} is 1")
    try:
        for ratio in ratios:
            for shrinkage in (0, 1 / 3, 1 / 2):  # no method of whole windows has all three
                made.at(shrunk(ratio, shrinkage))
    except ValueError as error:
        raise ValueError(f"--shrink-steps takes every ratio from 1 down, but {error}") from error


def video_options(args: ModelArguments) -> dict[str, Any]:
    """Gives the options of the video compressor."""
    return {} if args.video_keep_ratio is None else {"keep_ratio": args.video_keep_ratio}


def load_records(args: DataArguments, skips: SkipLog, seed: int) -> tuple[list[Record], list[Record], list[Record]]:
    """Gives the records to train on, to watch while training, and to evaluate at the end.

    Raises:
        ValueError: a file or record is wrong, or too little is left.
        FetchError: the speech is not in the cache and cannot be fetched.
    """
    if args.data == SPEECH:
        splits = []
        for split in ("train", "validation", "test"):
            if args.speech_dir:
                records = folder_records(args.speech_dir, split, args.min_words)
            else:
                records = speech_records(split, args.languages, args.min_words)
            limit = args.max_utterance_seconds
            splits.append([r for r in records if not (limit and r.duration and r.duration > limit)])
        train, validation, test = splits
    else:
        options = {"video_dir": args.video_dir, "audio_dir": args.audio_dir, "time_format": args.time_format}
        train = load_dialogues(args.data, turns=args.turns, skips=skips, **options)
        if args.eval_data:
            test = load_dialogues(args.eval_data, turns=args.turns, skips=skips, **options)
        else:
            cut = max(2, len(train) // 20)
            train, test = train[:-cut], train[-cut:]
        validation = test
    train = mix(train, seed, matching=args.mix_matching, joined=args.mix_joined)
    test = test[: args.max_eval_records]
    check_enough(train, test)
    return train, validation[: args.max_eval_records], test


def check_enough(train: list[Record], test: list[Record]) -> None:
    """Raises ValueError unless there is something to learn from, and two held-out sounds that can be swapped."""
    sounds = {record.audio for record in test} - {None}
    if not train or len(sounds) < 2:
        raise ValueError(
            f"{len(train)} training records and {len(test)} held-out ones of {len(sounds)} sounds are too few; needed "
            f"are 1 and 2 of different sounds"
        )


def say(step: int, what: str) -> None:
    """Prints what is being done, once for all processes."""
    if os.environ.get("RANK", "0") == "0":
        print(f"[{step}/5] {what}", flush=True)


def what_to_train(model: CompressedOmni, asked: list[str]) -> set[str]:
    """Resolves `auto` and `none`; see `ModelArguments.train`."""
    if asked != ["auto"]:
        return set(asked) - {"none"}
    names = {"adapter"}
    if model.own_parameters("compressor"):
        names.add("compressor")
    if has_random_projector(model):
        names.add("projector")
    return names


def cache_audio(model: CompressedOmni, dataset: RecordDataset) -> list[dict[str, Any]]:
    """Gives all samples encoded, with the audio tower's states beside the features."""
    samples = []
    in_tower, after = model.compressor.split()
    needs = frozenset() if after is None else after.needs
    for sample in tqdm(dataset, desc="audio tower, once per clip"):
        if "input_features" in sample:
            features = sample["input_features"][None].to(model.device)
            mask = torch.ones(features.shape[::2], dtype=torch.long, device=model.device)
            sample["audio_hidden"] = hidden_audio(model.thinker, features, mask, needs, in_tower)[0].cpu()
        samples.append(sample)
    return samples


def resolved(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: RunArguments,
    compressor: Compressor,
    ratios: tuple[float, ...],
) -> dict[str, Any]:
    """Gives every setting of this script, and of transformers' those that differ from its defaults."""
    ours = {*RunArguments.__annotations__, *FIRST_RUN}  # whose defaults are not transformers'
    usual = {f.name: f.default for f in dataclasses.fields(TrainingArguments) if f.name not in ours}
    own = {k: v for k, v in args.to_dict().items() if v != usual.get(k, dataclasses.MISSING)}
    options = dataclasses.asdict(model_args) | {"method": compressor.describe()}
    options["keep_ratio"] = ratios[0] if len(ratios) == 1 else list(ratios) or None
    return options | dataclasses.asdict(data_args) | own


def show_layout(model: CompressedOmni, encoder: Encoder, record: Record) -> str:
    """Gives the token tree of one record, before and after."""
    inputs = to_device(OmniCollator(0)([encoder(record)]), model.device)
    del inputs["labels"]
    with torch.no_grad():
        after, _ = model.eval().encode(**inputs)
    return model.layout(**inputs).describe(after=after.layout)


def parameter_counts(model: CompressedOmni) -> str:
    """Gives one line per part: its parameters and how many of them are trained."""
    lines = [f"{'part':<12}{'parameters':>14}{'trained':>14}"]
    parts = {name: model.own_parameters(name).values() for name in storage.PARTS} | {"all": list(model.parameters())}
    for name, tensors in parts.items():
        total, trained = (sum(p.numel() for p in tensors if p.requires_grad or not only) for only in (False, True))
        lines.append(f"{name:<12}{total:>14,}{trained:>14,}")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Runs the whole job."""
    started = time.perf_counter()
    model_args, data_args, args = parse(argv)
    options, ratios = method_options(model_args, args.shrink_steps)
    if unknown := set(model_args.train) - {"auto", "none", *TRAINABLE}:
        raise ValueError(f"--train takes auto, none, {', '.join(TRAINABLE)}, got {', '.join(sorted(unknown))}")
    if len(model_args.train) > 1 and {"auto", "none"} & set(model_args.train):
        raise ValueError(f"--train auto and --train none stand alone, got {' '.join(model_args.train)}")
    if storage.is_saved(model_args.model):
        raise ValueError(f"--model {model_args.model} is a saved variant: give its base model, or --resume a run")
    skips = SkipLog(data_args.strict)
    folder = Path(args.output_dir)
    checkpoint = last_checkpoint(folder) if args.resume else None
    if args.resume and checkpoint is None:
        log.warning("there is no complete checkpoint in %s: starting anew", folder)
    if not args.resume and any(folder.glob("checkpoint-*")):
        raise ValueError(f"{folder} holds checkpoints of an earlier run: give --resume, or another --output-dir")

    say(1, f"reading records: {data_args.speech_dir or data_args.data}")
    train, validation, test = load_records(data_args, skips, args.seed)

    say(2, f"opening {model_args.model}")
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan every step's shape anew, for 0.1 s
    model, processor = audiopress.load(model_args.model, device=args.device)
    transformers.set_seed(args.seed)  # here, as assembling omni-small on first use draws random numbers too
    compressor = build_for(model.thinker, model_args.compressor, **options).to(model.device)
    video_compressor = None
    if model_args.video_compressor is not None:
        video_compressor = build_for(model.thinker, model_args.video_compressor, **video_options(model_args))
    with torch.device("meta"):  # worker processes take the encoder along: it must hold no weights
        largest = build_for(model.thinker, model_args.compressor, **options)
        if args.shrink_steps or len(ratios) > 1:
            largest = largest.at(1.0 if args.shrink_steps else max(ratios))
    encoder = Encoder(
        processor,
        num_frames=data_args.num_frames,
        max_length=data_args.max_length,
        tokens_left=partial(tokens_left, largest, video_compressor),
        max_seconds=data_args.max_audio_seconds,
        timestamps=data_args.timestamps,
    )
    count = len({r.id for r in (*train, *validation, *test)} | set(skips.skipped))  # also those that could not be read
    validation, test = (usable(records, encoder, skips) for records in (validation, test))
    check_enough(train, test)
    if args.show_layout:
        model.compressor, model.video_compressor = compressor, video_compressor
        print(show_layout(model, encoder, max(test, key=lambda r: r.duration or 0)))
        return
    score = partial(
        evaluate,
        processor=processor,
        encoder=encoder,
        batch_size=args.per_device_eval_batch_size,
        max_new_tokens=args.max_new_tokens,
    )

    say(3, f"evaluating the uncompressed model as it comes on {len(test)} held-out records")
    first = args.process_index == 0
    results = {"uncompressed, as it comes": score(model, test, name="uncompressed")} if first else {}

    model.compressor, model.video_compressor, model.seed = compressor, video_compressor, args.seed
    model.positions = model_args.positions
    if len(ratios) > 1:
        model.set_keep_ratios(ratios)
    names = what_to_train(model, model_args.train)
    if "adapter" in names:
        model.add_adapter(model_args.lora_r, model_args.lora_alpha, model_args.lora_dropout)
    weight = model_args.ctc_weight
    if weight is None:
        weight = 0.5 if data_args.data == SPEECH and names & {"compressor", "projector"} else 0.0
    if weight:
        model.add_ctc(weight)
    model.set_trainable(names)
    warmup = model_args.ctc_warmup_steps
    if warmup is None:
        warmup = CTC_WARMUP_STEPS if weight and names & {"compressor", "projector"} else 0
    if warmup and not (weight and names & {"compressor", "projector"}):
        raise ValueError("--ctc-warmup-steps needs a --ctc-weight above 0, and compressor or projector in --train")
    config = resolved(model_args, data_args, args, compressor, ratios)
    what = f"training {', '.join(sorted(names))} on {len(train)} records" if names else "nothing is trained"
    say(4, what)
    if first:
        print(yaml.safe_dump(config, sort_keys=False, width=110), end="")
        print(parameter_counts(model))
    clock = RunCallback()
    warmup_losses: list[float] = []
    rate_losses: list[float] = []
    history: list[dict[str, Any]] = []
    if names:
        dataset = RecordDataset(train, encoder, data_args.strict)
        if data_args.cache_audio or (data_args.cache_audio is None and data_args.data == SPEECH):
            dataset = cache_audio(model, dataset)
        collate = OmniCollator(processor.tokenizer.pad_token_id)
        if data_args.data == SPEECH and model_args.speech_rate_steps and checkpoint is None:
            texts = {r.id: r.reference for r in train}
            rate_losses = fit_speech_rate(model, dataset, texts, steps=model_args.speech_rate_steps, seed=args.seed)
        if warmup and checkpoint is None:
            rate_and_seed = {"learning_rate": args.warmup_learning_rate, "seed": args.seed}
            warmup_losses = warm_up(model, dataset, collate, steps=warmup, **rate_and_seed)
        trainer = CompressTrainer(
            model,
            args,
            data_collator=collate,
            train_dataset=dataset,
            eval_dataset=RecordDataset(validation or test, encoder, data_args.strict),
            callbacks=[clock, StepCallback(model, args.shrink_steps)],
            on_skip=skips.add,
        )
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.save_model()
        history = trainer.state.log_history
    elif first:
        model.save_pretrained(folder)
    if not first:
        return

    variant = "trained variant" if names else "variant, untrained"
    say(5, f"evaluating the {variant}, and what it does with other audio")
    results |= {
        variant: (own := score(model, test, name=variant)),
        "the same, shuffled audio": score(model, with_other_audio(test, encoder), name="shuffled audio"),
    }
    for ratio in ratios[1:]:
        model.compressor = compressor.at(ratio)
        results[f"the same at keep_ratio {ratio:g}"] = score(model, test, name=f"at {ratio:g}")
    model.compressor = compressor
    summary = {
        "environment": environment(model.device),
        "seconds_per_step": statistics.median(clock.seconds) if clock.seconds else None,
        "peak_memory_gb": peak_memory(model.device) / 1e9,
        "minutes": (time.perf_counter() - started) / 60,
        "skipped": skips.skipped,
        "compressor": compressor.describe(),
        "results": {name: row(result) for name, result in results.items()},
        "warm_up_losses": [round(loss, 4) for loss in warmup_losses],
        "speech_rate_losses": [round(loss, 4) for loss in rate_losses],
        "config": config,
    }
    storage.write_json(summary, folder / "results.json")
    answers = [
        {"id": r.id, "reference": r.reference, **{name: e.answers[r.id] for name, e in results.items()}} for r in test
    ]
    storage.write_json(answers, folder / "answers.json")
    draw(folder, model, encoder, history, test)
    print(table(summary))
    skips.report(count)
    for record in test[:3]:
        print(f"for example: {record.reference!r} is answered {own.answers[record.id]!r}")
    print(f"in {folder}: " + ", ".join(sorted(p.name for p in folder.iterdir() if p.is_file())))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, FetchError) as error:
        sys.exit(f"error: {error}")
