"""The pipelines of transformers, on saved models with a tokenizer of their own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, pipeline

from mot_hf import (
    MoTForCausalLM,
    MoTForMaskedLM,
    MoTForSequenceClassification,
    MoTForTokenClassification,
    MoTModel,
    MoTPreTrainedModel,
)
from tests.models import MODES, tiny_config, trained

TEXTS = ["tokens of many rows are mixed", "a group of tokens", "rows and columns of a batch"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<end>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<end>",
        mask_token="<mask>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def save(head: type[MoTPreTrainedModel], folder: Path, tokenizer: PreTrainedTokenizerFast) -> MoTPreTrainedModel:
    model = trained(head(tiny_config(vocab_size=len(tokenizer), num_labels=3)))
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def test_text_generation_continues_texts_as_generate_does(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = save(MoTForCausalLM, folder, tokenizer)
    generator = pipeline("text-generation", model=str(folder), device="cpu")
    assert type(generator.model) is MoTForCausalLM
    greedy = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}

    def continue_texts(texts: list[str], mode: str) -> list[str]:
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        new = tokenizer.batch_decode(model.generate(**inputs, **greedy, mixing=mode)[:, -6:], skip_special_tokens=True)
        return [text + continuation for text, continuation in zip(texts, new, strict=True)]

    def run_pipeline(**arguments: Any) -> list[str]:
        return [output[0]["generated_text"] for output in generator(TEXTS, **greedy, **arguments)]

    together = {mode: continue_texts(TEXTS, mode) for mode in MODES}
    assert len({tuple(texts) for texts in together.values()}) == 3
    for mode in MODES:
        assert run_pipeline(mixing=mode) == [continue_texts([text], mode)[0] for text in TEXTS]
        assert run_pipeline(mixing=mode, batch_size=3) == together[mode]
    assert run_pipeline() == run_pipeline(batch_size=3) == together["per_sequence"]


def test_text_generation_refuses_an_unknown_mixing(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    save(MoTForCausalLM, folder, tokenizer)
    generator = pipeline("text-generation", model=str(folder), device="cpu")
    with pytest.raises(ValueError, match="`mixing` must be one of"):
        generator("a group", mixing="both")


@pytest.mark.parametrize(
    ("task", "head"),
    [
        ("text-generation", MoTForCausalLM),
        ("fill-mask", MoTForMaskedLM),
        ("token-classification", MoTForTokenClassification),
    ],
)
def test_a_misspelled_argument_is_refused(
    task: str, head: type[MoTPreTrainedModel], folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    save(head, folder, tokenizer)
    run = pipeline(task, model=str(folder), device="cpu")
    with pytest.raises((TypeError, ValueError), match="mixin"):
        run("a group of <mask>", mixin="moe")


@torch.no_grad()
def test_fill_mask_proposes_the_likeliest_tokens(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = save(MoTForMaskedLM, folder, tokenizer)
    filler = pipeline("fill-mask", model=str(folder), device="cpu")
    assert type(filler.model) is MoTForMaskedLM
    text = "a group of <mask> tokens"
    proposals = filler(text, top_k=4)
    ids = tokenizer(text, return_tensors="pt")
    column = ids["input_ids"][0].tolist().index(tokenizer.mask_token_id)
    expected = model(**ids).logits[0, column].softmax(-1).topk(4)
    assert [proposal["token"] for proposal in proposals] == expected.indices.tolist()
    assert [proposal["score"] for proposal in proposals] == pytest.approx(expected.values.tolist(), rel=1e-4)


@torch.no_grad()
def test_text_classification_gives_the_label_of_each_text(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = save(MoTForSequenceClassification, folder, tokenizer)
    classifier = pipeline("text-classification", model=str(folder), device="cpu")
    for batch_size in (1, 3):
        for text, result in zip(TEXTS, classifier(TEXTS, batch_size=batch_size), strict=True):
            expected = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
            assert result["label"] == f"LABEL_{expected.argmax().item()}"
            assert result["score"] == pytest.approx(expected.max().item(), rel=1e-4)


@torch.no_grad()
def test_token_classification_gives_a_label_for_every_token(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = save(MoTForTokenClassification, folder, tokenizer)
    classifier = pipeline("token-classification", model=str(folder), device="cpu")
    ids = tokenizer(TEXTS[0], return_tensors="pt")
    expected = model(**ids).logits[0].argmax(-1)
    results = classifier(TEXTS[0])
    assert [result["index"] for result in results] == list(range(len(expected)))
    assert [result["entity"] for result in results] == [f"LABEL_{label}" for label in expected.tolist()]


@torch.no_grad()
def test_feature_extraction_gives_the_last_hidden_state(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = save(MoTModel, folder, tokenizer)
    features = pipeline("feature-extraction", model=str(folder), device="cpu")(TEXTS[1], return_tensors=True)
    expected = model(**tokenizer(TEXTS[1], return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)
