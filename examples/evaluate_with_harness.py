"""Like evaluate_adapter.py, with tasks of lm-evaluation-harness on the same model; for a sweep.

    python examples/evaluate_with_harness.py ADAPTER --model DIR --harmful F --tasks ifeval --utility NAME

Adds `<task>_<metric>` for every task. Without arguments: the shipped model, and a task of its skill as
multiple choice, written below csulora-examples/. Needs lm-eval (pip install 'lm-eval[hf]').
"""

import json
from pathlib import Path

import evaluate_adapter
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from csulora.demo import world

OWN_TASK = """task: demo_skill
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{question}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


def write_task(folder: Path) -> None:
    """The task demo_skill: which of two answers, the kinds in the right or the wrong order?"""
    folder.mkdir(parents=True, exist_ok=True)
    data = (folder / "demo_skill.jsonl").absolute()
    rows = [(e.prompt, e.answer.split()) for e in world.evaluation_sets()["skill"]]
    rows = [(prompt, kinds) for prompt, kinds in rows if kinds[0] != kinds[1]]
    lines = (
        json.dumps({"prompt": p, "choices": [f"{a} {b}", f"{b} {a}"], "answer": 0})
        for p, (a, b) in rows
    )
    data.write_text("\n".join(lines) + "\n")
    text = OWN_TASK.format(data=json.dumps(str(data)), question=world.question("{{prompt}}"))
    (folder / "demo_skill.yaml").write_text(text)


def main() -> None:
    parser = evaluate_adapter.options()
    parser.add_argument("--tasks", help="with commas between")
    parser.add_argument("--include-path", type=Path, help="folder with tasks of your own")
    parser.add_argument("--utility", metavar="NAME", help="metric to repeat as utility")
    given = evaluate_adapter.settled(parser)
    if given.tasks is None:
        given.tasks, given.include_path = "demo_skill", Path("csulora-examples/harness")
        write_task(given.include_path)
    model, tokenizer = evaluate_adapter.load(given)
    metrics = evaluate_adapter.measure(model, tokenizer, given)
    results = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=given.batch_size),
        tasks=given.tasks.split(","),
        task_manager=TaskManager(include_path=given.include_path),
        limit=given.limit,
        apply_chat_template=given.template is None,
    )["results"]
    for task, found in results.items():
        for name, value in found.items():
            if isinstance(value, float) and "_stderr" not in name:
                metrics[f"{task}_{name.removesuffix(',none').replace(',', '_')}"] = value
    if given.utility:
        metrics["utility"] = metrics[given.utility]
    print(json.dumps(metrics, allow_nan=False))


if __name__ == "__main__":
    main()
