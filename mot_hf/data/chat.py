"""Chats as text: the tokens that mark turns, and the template that writes messages with them."""

from transformers import PreTrainedTokenizerBase

END_OF_TURN_TOKEN = "<|end_of_turn|>"
ROLES = ("system", "user", "assistant")
CHAT_TOKENS = [*(f"<|{role}|>" for role in ROLES), END_OF_TURN_TOKEN]

# A turn is the token of its role, its text, and the token that ends it. What the assistant writes, with the end of its
# turn, lies between the marks that a trainer computes its loss by.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception("The roles are system, user and assistant, not '" ~ message['role'] ~ "'.") }}
    {%- elif message['content'] is not string %}
        {{- raise_exception("The content of a message must be text.") }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{ message['content'] + '<|end_of_turn|>' }}{% endgeneration %}
    {%- else %}
        {{- message['content'] + '<|end_of_turn|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""

# What servers take as the answer: without it, they would look for the marks of Qwen3-MoE in those of an export.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "content": {"close": [END_OF_TURN_TOKEN, "<|end|>"], "content": "text", "content_args": {"strip": False}},
    },
}


def add_chat_template(tokenizer: PreTrainedTokenizerBase) -> int:
    """Gives a tokenizer the template of chats and its tokens, such as `<|user|>`, `<|assistant|>`, `<|end_of_turn|>`.

    A model whose answers end with `<|end_of_turn|>` must have it as an end token in its generation settings.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer, which is changed in place.

    Returns:
        `int`: Number of tokens that it did not have.
    """
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.response_template = RESPONSE_TEMPLATE
    return tokenizer.add_tokens(CHAT_TOKENS, special_tokens=True)
