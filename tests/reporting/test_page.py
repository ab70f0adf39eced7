"""The page about a training run."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from mot_hf import MoTForCausalLM, MoTForMaskedLM, MoTForSequenceClassification, MoTPreTrainedModel
from mot_hf.data.tokenizer import train_tokenizer
from mot_hf.reporting.figures import draw_training_curve, to_data_uri
from mot_hf.reporting.mixing_probe import measure_experts, measure_losses
from mot_hf.reporting.page import write_report
from mot_hf.reporting.passages import find_passage, show_invisible
from mot_hf.sizes import count_parameters
from mot_hf.storage.run_log import Run, find_run
from tests.models import tiny_config, trained

TEXTS = ["if a < b and b > c:\n\tprint('größer & <b>bold</b>')\n" * 30]
T = 8
HISTORY = [
    {"step": 10, "loss": 5.0, "learning_rate": 1e-3, "mixing/full_groups": 1.0},
    {"step": 10, "eval_loss": 4.5, "eval_bits_per_byte": 2.5},
    {"step": 20, "loss": 4.25, "learning_rate": 1e-4, "mixing/full_groups": 1.0},
    {"step": 20, "eval_loss": 4.75, "eval_bits_per_byte": 2.625},
]
MIXING = {
    f"mixing/{quantity}/layers_{layers}": 0.5
    for quantity in ("entropy", "largest_weight", "effective_tokens", "mixture_similarity", "companion_drift")
    for layers in ("2", "3")
}
MODES = {"eval_cross_example_loss": 4.5, "eval_per_sequence_loss": 4.5, "eval_moe_loss": 5.0}


class Page(HTMLParser):
    """Text, tables, highlighted texts and resources of a page; every end tag must fit."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.text = html, ""
        self.tags: list[str] = []
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.alts: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.marks: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if values.get("rel") == "icon":
            assert values["href"] == "data:,"  # a browser would look for one on the host
            return
        self.tags.append(tag)
        self.addresses += [values[name] or "" for name in ("src", "href", "srcset", "action") if name in values]
        self.alts += [values["alt"] or ""] if tag == "img" else []
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "mark":
            self.marks.append("")
        if tag not in ("meta", "img", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += " ".join(data.split()) + " " if "style" not in self.open else ""
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data
        if "mark" in self.open:
            self.marks[-1] += data

    def table(self, first: str) -> list[list[str]]:
        return next(table for table in self.tables if table[0][0] == first)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, vocab_size=280)


def make_model(head: type[MoTPreTrainedModel] = MoTForCausalLM, **overrides: Any) -> MoTPreTrainedModel:
    return trained(head(tiny_config(vocab_size=280, **overrides)))


def make_batches(tokenizer: PreTrainedTokenizerFast, *, mlm: bool = False) -> list[dict[str, Tensor]]:
    ids = tokenizer(TEXTS)["input_ids"][0]
    rows = [{"input_ids": ids[n * T : (n + 1) * T]} for n in range(12)]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=mlm, seed=0)
    return [dict(collator(part)) for part in (rows[:8], rows[8:])]


def make_page(
    folder: Path,
    model: MoTPreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    batches: list[dict[str, Tensor]],
    log_history: list[dict[str, Any]] | None = None,
) -> Page:
    run = Run(folder, folder, log_history or [], num_steps=20 if log_history else 0, max_steps=40)
    write_report(run, model, tokenizer, batches, folder / "report.html", text_name="some <text>")
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def visible(text: str) -> str:
    return text.replace(" ", "·").replace("\n", "↵").replace("\t", "→")


def test_loads_of_experts_are_drawn(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    loads = {"mixing/busiest_expert/layers_2": 1.5, "mixing/idle_experts/layers_2": 3.0}
    history = [HISTORY[0] | loads, HISTORY[2] | loads]
    page = make_page(tmp_path, make_model(), tokenizer, [], history)
    assert "Load of the busiest expert over the training steps" in page.alts
    assert "Experts without a token over the training steps" in page.alts


def test_the_page_needs_nothing_else(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    history = [{**entry, **(MODES if "eval_loss" in entry else MIXING)} for entry in HISTORY]
    page = make_page(tmp_path, make_model(), tokenizer, make_batches(tokenizer), history)
    assert len(page.addresses) == 9  # training, 6 of mixing, experts, modes
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert len(set(page.alts)) == 9
    assert all(page.alts)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert not any(word in page.html for word in ("http:", "https:", "url(", "@import"))


def test_the_same_run_gives_the_same_page(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model, batches = make_model(), make_batches(tokenizer)
    pages = [make_page(tmp_path, model, tokenizer, batches, HISTORY).html for _ in range(2)]
    assert pages[0] == pages[1]


def test_the_head_describes_the_model(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = make_model()
    facts = dict(make_page(tmp_path, model, tokenizer, make_batches(tokenizer), HISTORY).tables[0])
    size = count_parameters(model)
    assert facts["Parameters"] == f"{size.total:,} in total, {size.active:,} active per token"
    assert facts["Model"].startswith("MoTForCausalLM")
    assert facts["MoT layers"] == "2, 3"
    assert facts["Experts"] == "E = 8 of width 32 in each MoT layer"
    assert facts["Groups"].startswith("G = 4 ")
    assert facts["Experts per token"].startswith("K = 2 ")
    assert facts["Mixing"] == "cross_example in training, per_sequence at inference"
    assert facts["Steps"] == "20 of 40"


def test_losses_are_listed_with_their_steps(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    page = make_page(tmp_path, make_model(), tokenizer, make_batches(tokenizer), HISTORY)
    assert page.table("logged")[1:] == [
        ["training loss", "4.2500", "20", "4.2500", "20"],
        ["validation loss", "4.7500", "20", "4.5000", "10"],
        ["bits per byte", "2.6250", "20", "2.5000", "10"],
    ]
    assert f"perplexity of {math.exp(4.75):.2f}" in page.text


def test_a_loss_that_is_no_number_is_not_the_lowest(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    history = [{"step": 5, "loss": float("nan")}, *HISTORY, {"step": 30, "loss": float("nan")}]
    page = make_page(tmp_path, make_model(), tokenizer, [], history)
    assert page.table("logged")[1] == ["training loss", "nan", "30", "4.2500", "20"]


@pytest.mark.parametrize("head", [MoTForCausalLM, MoTForMaskedLM])
def test_tables_hold_what_was_measured(
    head: type[MoTPreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model, batches = make_model(head), make_batches(tokenizer, mlm=head is MoTForMaskedLM)
    page = make_page(tmp_path, model, tokenizer, batches, HISTORY)
    layers = measure_experts(model, batches)
    assert [row[:2] for row in page.table("layer")[1:]] == [[str(l.layer), f"{l.entropy.mean():.3f}"] for l in layers]
    losses = [[row.mode, f"{row.loss:.4f}", f"{row.perplexity:.2f}"] for row in measure_losses(model, batches)]
    assert [row[:3] for row in page.table("mode")[1:]] == losses
    assert ("as the model saw it" in page.text) == (head is MoTForMaskedLM)
    assert "12 validation rows of 8 tokens from some <text>" in page.text


def test_tokens_are_shown_in_their_text_and_escaped(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model, batches = make_model(), make_batches(tokenizer)
    page = make_page(tmp_path, model, tokenizer, batches)
    rows = torch.cat([batch["input_ids"] for batch in batches])
    tables = [table[1:] for table in page.tables if table[0][0] == "weight"]
    assert len(tables) == 2 * 3
    expected = []
    for layer in measure_experts(model, batches):
        for expert in sorted(range(8), key=lambda e: float(layer.effective_tokens[e]))[:3]:
            for weight, place in zip(layer.top_weights[:, expert], layer.top_tokens[:, expert].tolist(), strict=True):
                row, column = rows[place // T].tolist(), place % T
                expected.append([f"{weight:.3f}", visible(tokenizer.decode(row[: column + 7]).strip("\ufffd"))])
    assert [row for table in tables for row in table] == expected
    assert any("<" in text for _, text in expected)
    assert "b" not in page.tags
    assert len(page.marks) == len(expected)


def test_a_part_of_a_character_is_shown_as_the_whole() -> None:
    plain = train_tokenizer(["abc"], vocab_size=259)  # every byte is a token
    row = plain("aé€z😀!")["input_ids"]
    characters = "aéé€€€z😀😀😀😀!"
    assert [find_passage(plain, row, column).token for column in range(len(row))] == list(characters)
    for column in range(len(row)):
        assert "".join(find_passage(plain, row, column, num_after=12)) == "aé€z😀!"
    assert find_passage(plain, row, 6, num_before=1, num_after=2) == ("", "z", "")


def test_bytes_that_make_no_character_are_shown_as_such() -> None:
    plain = train_tokenizer(["abc"], vocab_size=259)
    row = plain("a€b")["input_ids"]
    del row[3]  # the last byte of three
    for column in (1, 2):
        before, token, after = find_passage(plain, row, column)
        assert token == "\ufffd"
        assert before.startswith("a")
        assert after.endswith("b")


def test_what_has_no_shape_is_made_visible() -> None:
    html = str(show_invisible("a <\n\x00\u200b\u202e"))
    signs = "".join(f'<i class="invisible">{sign}</i><wbr>' for sign in ("↵", r"\x00", r"\u200b", r"\u202e"))
    assert html == f'a<i class="invisible">·</i><wbr>&lt;{signs}'


def test_what_was_not_logged_is_said(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    page = make_page(tmp_path, make_model(), tokenizer, make_batches(tokenizer))
    assert "The run has no log of losses" in page.text
    assert "The run had no mixing monitor" in page.text
    assert "The run did not log losses by mode" in page.text
    assert "Steps" not in dict(page.tables[0])
    assert len(page.addresses) == 1  # the experts


def test_a_dense_model_has_a_page(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = MoTForCausalLM(tiny_config(vocab_size=280, mlp_layer_types=["dense"] * 4))
    page = make_page(tmp_path, model, tokenizer, make_batches(tokenizer), HISTORY[1:2])
    assert page.text.count("The model has no MoT layers.") == 4
    facts = dict(page.tables[0])
    assert facts["MoT layers"] == "none"
    assert "Experts" not in facts


def test_a_classifier_has_a_page(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = make_model(MoTForSequenceClassification)
    page = make_page(tmp_path, model, tokenizer, make_batches(tokenizer), HISTORY)
    assert "Losses by mode are measured for language models only" in page.text
    assert "perplexity" not in page.text
    assert len(page.table("layer")) == 3


def test_too_little_text_is_said(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    page = make_page(tmp_path, make_model(), tokenizer, [], HISTORY)
    assert page.text.count("fewer rows than a group (G = 4)") == 3


def test_bits_per_byte_of_another_kind_of_tokenizer_are_not_known(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(tokenizer: PreTrainedTokenizerFast) -> Tensor:
        raise ValueError("not byte-level")

    monkeypatch.setattr("mot_hf.reporting.page.token_byte_counts", refuse)
    page = make_page(tmp_path, make_model(), tokenizer, make_batches(tokenizer))
    assert {row[3] for row in page.table("mode")[1:]} == {"unknown"}
    assert "Bits per byte require a byte-level tokenizer" in page.text


def test_large_pictures_are_png() -> None:
    history = [{"step": step, "loss": loss} for step, loss in enumerate(torch.rand(30_000).tolist())]
    assert to_data_uri(draw_training_curve(history)).startswith("data:image/png;base64,")
    assert to_data_uri(draw_training_curve(history[:100])).startswith("data:image/svg+xml;base64,")


def test_the_log_of_a_folder_reaches_the_page(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    state = {"global_step": 20, "max_steps": 20, "log_history": HISTORY}
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-20" / "trainer_state.json").write_text(json.dumps(state))
    run = find_run(tmp_path)
    write_report(run, make_model(), tokenizer, [], tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.table("logged")[1][1] == "4.2500"
