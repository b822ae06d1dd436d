#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0, accelerate 1.15.0 (PyPI), Python 3.11: `dataloader_drop_last` also drops rows from
# `Trainer.evaluate` and `Trainer.predict`.
#
# `dataloader_drop_last=True` is set for training, where a small last batch would be noisy (or a loss needs a full one).
# The same setting reaches the loaders for evaluation and prediction: the rows after the last full batch are not scored.
# `predict` returns fewer predictions than rows, and the metrics are of the shortened set; nothing is said. In plain
# torch one would give `drop_last` to the training loader alone, and every row of a test set is expected to count. The
# effect grows with the evaluation batch size, and hits the last rows: all of one class, if the rows are sorted.
#
# What to do: an evaluation batch size that divides the number of rows, or `trainer.args.dataloader_drop_last = False`
# before evaluating; compare `len(predictions)` with the number of rows.
#
# Output seen (10 rows, batches of 4):
#     drop_last=False: 10 predictions, labels [0, 0, 0, 0, 0, 0, 0, 0, 1, 1]
#     drop_last=True: 8 predictions, labels [0, 0, 0, 0, 0, 0, 0, 0]
#     drop_last=True: share of class 1 in evaluate() 0.0
#     set back to False: 10 predictions
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
found=$(cd "$folder" && HF_HUB_OFFLINE=1 venv/bin/python - <<'PY'
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

SHAPE = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
ROWS = [{"input_ids": [1, 2, 3, 4], "labels": int(row >= 8)} for row in range(10)]


def trainer(drop_last):
    quiet = dict(report_to=[], disable_tqdm=True, use_cpu=True)
    arguments = TrainingArguments("out", per_device_eval_batch_size=4, dataloader_drop_last=drop_last, **quiet)
    model = BertForSequenceClassification(BertConfig(vocab_size=32, max_position_embeddings=16, **SHAPE))
    return Trainer(model, arguments, eval_dataset=ROWS, compute_metrics=lambda each: {"share": each.label_ids.mean()})


for drop_last in (False, True):
    made = trainer(drop_last)
    result = made.predict(ROWS)
    print(f"drop_last={drop_last}: {len(result.predictions)} predictions, labels {result.label_ids.tolist()}")
made.log = lambda *_, **__: None  # evaluate() would print its metrics here
print("drop_last=True: share of class 1 in evaluate()", float(made.evaluate()["eval_share"]))
made.args.dataloader_drop_last = False
print(f"set back to False: {len(made.predict(ROWS).predictions)} predictions")
PY
)
echo "$found"
[ "$found" = "drop_last=False: 10 predictions, labels [0, 0, 0, 0, 0, 0, 0, 0, 1, 1]
drop_last=True: 8 predictions, labels [0, 0, 0, 0, 0, 0, 0, 0]
drop_last=True: share of class 1 in evaluate() 0.0
set back to False: 10 predictions" ]
