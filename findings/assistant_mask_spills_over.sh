#!/usr/bin/env bash
# transformers 5.23.0, tokenizers 0.23.3, jinja2 3.1.6 (PyPI), Python 3.11: an assistant's turn that ends at the first
# token, or in a space that the tokenizer drops, marks everything after it as the assistant's.
#
# `apply_chat_template(..., return_assistant_tokens_mask=True)` is to mark the tokens of each {% generation %} block, so
# that a fine-tuning loss leaves the user's words out. The end of a block is looked up as a token, and where that answer
# is falsy the mask runs to the row's end, as it must for a row cut off there. But token 0 is falsy too (a conversation
# that begins with a greeting of one token), and a last character that belongs to no token has no answer (a template
# that closes the block after a space or newline, with a tokenizer that drops white space). The user's turns then count
# in the loss. A mask of the right length comes back, later blocks are marked rightly, and a conversation that begins
# with the user, or with two words, comes out right, so a spot check would not show it.
#
# What to do: let templates write a token before the first turn and close the block right after the words; compare the
# text of the marked tokens with the assistant's turns for every row, not for one. Reported upstream:
# huggingface/transformers#47325.
#
# Output seen (the marked words):
#     user first: ['hello']
#     assistant first, two words: ['hello', 'friend', 'yes']
#     assistant first, one word: ['hello', 'what', 'is', 'it', 'yes']
#     user first, a space in the block: ['hello', 'what', 'is', 'it']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6
found=$(cd "$folder" && HF_HUB_OFFLINE=1 venv/bin/python - <<'PY'
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["<unk>", "hello", "friend", "what", "is", "it", "yes", "thanks"]
words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{% endgeneration %} "
    "{% else %}{{ message.content }} {% endif %}{% endfor %}"
)
SPACE = TEMPLATE.replace("{% endgeneration %} ", " {% endgeneration %}")


def marked(name, turns, template=TEMPLATE):
    messages = [{"role": role, "content": content} for role, content in turns]
    row = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    kept = [token for token, mark in zip(row["input_ids"], row["assistant_masks"], strict=True) if mark]
    print(f"{name}: {tokenizer.convert_ids_to_tokens(kept)}")


question, answer = ("user", "what is it"), ("assistant", "yes")
marked("user first", [("user", "thanks"), ("assistant", "hello"), question])
marked("assistant first, two words", [("assistant", "hello friend"), question, answer])
marked("assistant first, one word", [("assistant", "hello"), question, answer])
marked("user first, a space in the block", [("user", "thanks"), ("assistant", "hello"), question], SPACE)
PY
)
echo "$found"
[ "$found" = "user first: ['hello']
assistant first, two words: ['hello', 'friend', 'yes']
assistant first, one word: ['hello', 'what', 'is', 'it', 'yes']
user first, a space in the block: ['hello', 'what', 'is', 'it']" ]
