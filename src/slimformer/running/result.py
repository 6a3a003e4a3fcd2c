"""The result of a run: its folder, what was measured, its model when it is asked for, and how it gets to the hub."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from slimformer.errors import ModelError, OutputError
from slimformer.exporters.base import PARTS, files_of, part_path
from slimformer.measuring.records import Record
from slimformer.reporting.ledger import FACTS_FILE, LEDGER, read_facts, read_records
from slimformer.reporting.verdicts import Conclusion, choice, findings, judge
from slimformer.reporting.words import lost_text, points_text
from slimformer.saving import checkpoint
from slimformer.saving.folders import MODEL_FOLDER
from slimformer.saving.headers import WEIGHTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ALONGSIDE = ("README.md", "config.json", "generation_config.json", WEIGHTS, FACTS_FILE, "recipe.yaml", "decode.py")
_STEPS = ("modules.json", "config_sentence_transformers.json", "sentence_*_config.json", "[0-9]_*/*")  # of a model of vectors


@dataclass(frozen=True, repr=False)
class Result:
    """What `compress` and `run` return. `print` shows one line of it, and `summary` all figures.

    Attributes:
        out: The folder with everything.
        records: Everything that was measured: the dense model first, then the rivals and our files. There are none if the model is
            one that others start from, as the task `text` makes it: it has no files but `model`.

    Example:
        >>> from slimformer import Result
        >>> result = Result.read("finished")  # the folder of an earlier run
        >>> result.best.suffix
        '.onnx'
        >>> result.speedup > 0, result.model.config.id2label
        (True, {0: 'bad', 1: 'good'})
    """

    out: Path
    records: tuple[Record, ...] = field(default=())

    @classmethod
    def read(cls, out: str | Path) -> Result:
        """The result in the folder of an earlier run.

        Args:
            out: The folder.

        Returns:
            The same as the run returned.

        Raises:
            ModelError: The folder holds no result.
            DataError: Its ledger cannot be read.

        Example:
            >>> from slimformer import Result
            >>> len(Result.read("finished").records) > 1
            True
        """
        folder = Path(out)
        if read_facts(folder) is None:
            raise ModelError(f"{folder} is no result of a run: it holds no {FACTS_FILE}.", help="name the --out of a run.")
        return cls(folder, tuple(read_records([folder / LEDGER]) if (folder / LEDGER).is_file() else ()))

    @property
    def record(self) -> Record:
        """What was measured of the best file; ModelError if no file was made."""
        ours = choice(self.records)
        if ours is None:
            raise ModelError(
                f"{self.out} holds a model for others to start from, and no measured file.", help="load it: .model."
            )
        return ours

    @property
    def best(self) -> Path:
        """The best file: the fastest one within the loss that was allowed, chosen on validation examples."""
        return self.out / self.record.file

    @property
    def speedup(self) -> float | None:
        """How many times as fast as the dense model in fp32 the best file is, at batch 32; None if it was not timed."""
        speed = self.record.times_faster(32)
        return None if speed is None else speed.median

    @property
    def points_lost(self) -> float | None:
        """Points of the metric that the best file lies below the dense model; negative if it is better."""
        loss = self.record.loss
        return None if loss is None else loss.value

    @property
    def met(self) -> bool | None:
        """Whether the speed and the loss that were asked for are met, beyond doubt; None if nothing was asked.

        It is False for a model that is worse than doing nothing.
        """
        conclusion = judge(self.record, self.records).conclusion
        return None if conclusion is None else conclusion is Conclusion.YES

    @property
    def findings(self) -> list[str]:
        """Sentences on how the best file stands against the rivals, on what makes the figures less sure, and last on the goal."""
        verdict, *others = findings(self.records)
        return [*others, verdict]

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model for PyTorch, loaded when it is first asked for."""
        return checkpoint.load(self.out)

    def summary(self) -> str:
        """The table of everything that was measured, and the verdict, as text of 80 columns.

        Returns:
            Lines for a terminal.

        Example:
            >>> from slimformer import Result
            >>> Result.read("finished").summary().splitlines()[1].split()
            ['model', 'accuracy', 'points', 'lost', 'MB', 'batch', '32', 'batch', '1', 'ms']
        """
        if not self.records:
            return str(self)
        from rich.console import Console

        from slimformer.reporting.terminal import draw_table

        text = StringIO()
        console = Console(file=text, width=80, no_color=True, force_terminal=False)
        console.print(draw_table(self.records))
        for line in self.findings:
            console.print(line, markup=False, highlight=False)
        return text.getvalue().rstrip()

    def __str__(self) -> str:
        if not self.records:
            return f"{self.out}: a model for others to start from, in {self.out / MODEL_FOLDER}"
        lost, speed = self.points_lost, self.speedup
        facts = [f"{speed:.2f} times as fast at batch 32"] if speed is not None else []
        facts += [f"{points_text(lost)} {lost_text(lost)}"] if lost is not None else []
        conclusion = judge(self.record, self.records).conclusion
        words = {None: "", Conclusion.YES: "goal met; ", Conclusion.NO: "goal not met; "}
        return f"{self.out}: {', '.join(facts)}; {words.get(conclusion, 'goal open; ')}best file {self.record.file}"

    def __repr__(self) -> str:
        return f"<Result {self}>"

    def save_dense(self, folder: str | Path) -> None:
        """Writes a plain transformers folder with the same answers, which `pipeline` reads without slimformer; see `save_dense`.

        Args:
            folder: The folder to write; one that exists is replaced.

        Raises:
            OutputError: The folder cannot be written.

        Example:
            >>> from slimformer import Result
            >>> Result.read("finished").save_dense("plain")
        """
        checkpoint.save_dense(self.out, folder)

    def shipped_files(self) -> tuple[Path, ...]:
        """The files that others need, and that `push_to_hub` uploads.

        They are models, configs, tokenizers, the card, slimformer.json and the recipe. Logs, the ledger and the page stay here:
        they tell of this machine, and hold texts of the data.

        Returns:
            Their paths, sorted.

        Example:
            >>> from slimformer import Result
            >>> sorted(file.name for file in Result.read("finished").shipped_files() if file.parent.name == "onnx")[:2]
            ['config.json', 'model.onnx']
        """
        facts = read_facts(self.out)
        named = [self.out / item.name for item in facts.files] if facts else []
        folders = {self.out, self.out / MODEL_FOLDER, *(file.parent for file in named)}
        beside = [folder / name for folder in folders for name in (*_ALONGSIDE, *checkpoint.TOKENIZER_FILES)]
        inner = [self.out / MODEL_FOLDER / name for name in checkpoint.OWN_FILES]
        whole = [*named, *(part_path(file, part) for file in named for part in PARTS)]
        models = [part for file in whole for part in files_of(file)]
        steps = [file for name in _STEPS for folder in (self.out, self.out / MODEL_FOLDER) for file in folder.glob(name)]
        return tuple(sorted({file for file in (*beside, *inner, *models, *steps) if file.is_file()}))

    def push_to_hub(self, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
        """Uploads what ships to a repository on the hub, which is made if there is none.

        Args:
            repo_id: The repository, "owner/name".
            private: Whether a new repository is visible to you alone.
            token: A token of the hub; by default the one that `hf auth login` stored.

        Returns:
            The address of the upload.

        Raises:
            OutputError: The hub cannot be reached, or does not take it.

        Example:
            >>> from slimformer import Result
            >>> from slimformer.errors import OutputError
            >>> try:
            ...     address = Result.read("finished").push_to_hub("me/small-bert")
            ... except OutputError as error:
            ...     print(error.help)
            check the network, the name, and your token (`hf auth login`).
        """
        from huggingface_hub import HfApi

        api, files = HfApi(token=token), [file.relative_to(self.out).as_posix() for file in self.shipped_files()]
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            address = api.upload_folder(
                repo_id=repo_id, folder_path=self.out, allow_patterns=files, commit_message="Upload by slimformer"
            )
        except Exception as error:  # network, names and permissions fail in as many ways as there are repositories
            reason = str(error).strip().splitlines()
            raise OutputError(
                f"nothing was uploaded to '{repo_id}'.",
                facts=[f"{type(error).__name__}: {reason[0] if reason else ''}"],
                help="check the network, the name, and your token (`hf auth login`).",
            ) from None
        return str(address)
