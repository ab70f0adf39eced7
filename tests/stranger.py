"""Uses MoT models as someone does who has transformers, but not `mot_hf`; run in a process without it.

`load SOURCE HEAD ...` loads checkpoints of the heads from SOURCE/HEAD, or SOURCE-HEAD of a Hub, compares their outputs
with `expected.safetensors` of the folder it runs in, takes a training step with each, and saves them in `out/HEAD`.
`load_and_push SOURCE HEAD ...` also trains SOURCE-AutoModelForCausalLM of a Hub a step further and pushes it to
SOURCE-trained, and a classifier to its branch `classifier`; `pushed.safetensors` gets their outputs.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, DefaultDataCollator, PreTrainedModel, Trainer, TrainingArguments

IDS = torch.arange(48).view(8, 6) + 2


def load(head: str, source: str, **options: Any) -> PreTrainedModel:
    """Load a model of the Auto class of that name; its code must be that of the checkpoint."""
    model = getattr(transformers, head).from_pretrained(source, trust_remote_code=True, **options)
    for thing in (model, model.config):
        assert type(thing).__module__.startswith("transformers_modules."), type(thing)
    return model.eval()


def answer(head: str, model: PreTrainedModel) -> torch.Tensor:
    """What a model makes of some tokens, in mode per_sequence."""
    with torch.no_grad():
        return model(IDS)[0].clone()


def labels_of(head: str) -> dict[str, list[Any]]:
    """Labels for the rows of tokens."""
    if head == "AutoModelForSequenceClassification":
        return {"labels": [0, 1] * 4}
    if head == "AutoModelForTokenClassification":
        return {"labels": (IDS % 2).tolist()}
    if head == "AutoModelForQuestionAnswering":
        return {"start_positions": [1] * 8, "end_positions": [2] * 8}
    return {"labels": IDS.tolist()}


def fine_tune(head: str, model: PreTrainedModel, output_dir: str, **options: Any) -> Trainer:
    """Take one step with the stock `Trainer`, and save the model."""
    columns = {"input_ids": IDS.tolist()} | labels_of(head)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    settings: dict[str, Any] = {"per_device_train_batch_size": 8, "max_steps": 1, "learning_rate": 0.01}
    settings |= {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "save_steps": 1}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = TrainingArguments(output_dir, **(settings | options))
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=DefaultDataCollator())
    trainer.train()
    trainer.save_model()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any("experts" in name for name in changed)
    assert any("companions" in name for name in changed)
    return trainer


def check_saved(folder: Path) -> None:
    """Check that a saved model carries the code and the names of all heads."""
    files = {path.name for path in folder.iterdir()}
    assert {"configuration_mot.py", "experts_mot.py", "mixing_mot.py", "modeling_mot.py", "heads_mot.py"} <= files, (
        files
    )
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert len(auto_map) == 7, auto_map
    assert not any("--" in name for name in auto_map.values()), auto_map


def load_and_train(source: str, *heads: str) -> None:
    """See above."""
    expected = load_file("expected.safetensors")
    for head in heads:
        place = f"{source}/{head}" if Path(source).is_dir() else f"{source}-{head}"
        model = load(head, place)
        torch.testing.assert_close(answer(head, model), expected[head])
        if head == "AutoModelForCausalLM":
            generated = model.generate(IDS[:2], max_new_tokens=8, do_sample=False)
            assert torch.equal(generated, expected["generated"])
        if head != "AutoModel":
            fine_tune(head, model, f"out/{head}")
            check_saved(Path(f"out/{head}/checkpoint-1"))
        else:
            model.save_pretrained(f"out/{head}")
        check_saved(Path(f"out/{head}"))
        again = load(head, f"out/{head}")
        torch.testing.assert_close(answer(head, again), answer(head, model.eval()))
    # Saved by one head, and loaded by another.
    load("AutoModelForTokenClassification", f"out/{heads[0]}")
    AutoConfig.from_pretrained(f"out/{heads[0]}", trust_remote_code=True).save_pretrained("out/config")
    check_saved(Path("out/config"))


def push(source: str) -> None:
    """See above."""
    causal, classifier, target = "AutoModelForCausalLM", "AutoModelForSequenceClassification", f"{source}-trained"
    tokenizer = AutoTokenizer.from_pretrained(f"{source}-{causal}", trust_remote_code=True)
    options = {"push_to_hub": True, "hub_model_id": target, "hub_strategy": "end"}
    model = load(causal, f"{source}-{causal}")
    trainer = fine_tune(causal, model, "pushed", **options)
    trainer.push_to_hub()
    tokenizer.push_to_hub(target)
    answers = {causal: answer(causal, model.eval())}
    other = load(classifier, f"{source}-{classifier}")
    other.push_to_hub(target, revision="classifier")
    answers[classifier] = answer(classifier, other)
    for head, revision in ((causal, "main"), (classifier, "classifier")):
        torch.testing.assert_close(answer(head, load(head, target, revision=revision)), answers[head])
    save_file(answers, "pushed.safetensors")


if __name__ == "__main__":
    try:
        import mot_hf  # noqa: F401
    except ModuleNotFoundError:
        torch.set_num_threads(1)
        load_and_train(*sys.argv[2:])
        if sys.argv[1] == "load_and_push":
            push(sys.argv[2])
    else:
        raise SystemExit("mot_hf is installed here")
