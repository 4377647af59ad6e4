"""Conversations, and tokenizers with chat templates of every kind."""

from tests.support.tokenizers import byte_level

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Gemma's and Mistral's: no system message, users and assistants in turn.
STRICT = (
    "{{ '<s>' }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% elif message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + '</s>' }}{% endif %}"
    "{% endfor %}"
)
# As Qwen3's: thoughts of earlier turns are dropped.
FORGETS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and not loop.last %}{{ message['content'].split('</think>')[-1] }}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') }}"
    "{% for call in message['tool_calls'] or [] %}{{ '<call>' + (call['function'] | tojson) }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_tokenizer(folder, template=CHATML):
    """A byte-level tokenizer with the control tokens of ChatML and this template; none for ''."""
    special = ["<|im_start|>", "<|im_end|>"]
    return byte_level(folder, additional_special_tokens=special, **({"chat_template": template} if template else {}))


def chat(*contents, system=None):
    """Messages of a user and an assistant in turn."""
    first = [{"role": "system", "content": system}] if system else []
    return first + [
        {"role": ("user", "assistant")[number % 2], "content": content} for number, content in enumerate(contents)
    ]


TOPICS = {
    "ships": "The ship left the harbour at dawn and the sailors saw the northern coast in the rain",
    "courts": "The court heard the appeal of the owner and the judge read the letter of the lawyer twice",
    "bread": "He sold fresh bread in the market and the baker mixed flour with water and yeast all night",
    "engines": "The engine failed again and the mechanic changed the valve and the oil of the old machine",
}


def chats(count):
    """(topic, messages) of conversations of one to three turns, about each topic in turn, all different."""
    found = []
    for number in range(count):
        topic = list(TOPICS)[number % len(TOPICS)]
        words = TOPICS[topic].split()
        turns = []
        for turn in range(1 + number % 3):
            start = (number + 3 * turn) % len(words)
            said = words[start:] + words[:start]
            turns += [f"What about {' '.join(said[:6])}? {number}", f"{' '.join(said[: 8 + number % 5])}. {number}"]
        found.append((topic, chat(*turns)))
    return found
