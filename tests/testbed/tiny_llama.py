"""tiny_llama.py FOLDER [HIDDEN LAYERS CONTEXT]: a Llama of random weights with a tokenizer and a chat template, for
vLLM on CPU; no network.

Runs with vLLM's Python (torch, transformers, tokenizers).
"""

# mypy: ignore-errors
import json
import pathlib
import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HIDDEN, LAYERS, CONTEXT = map(int, sys.argv[2:5] or (64, 2, 2048))
TEMPLATE = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)
folder = sys.argv[1]
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.train_from_iterator(
    [file.read_text(errors="ignore") for file in sorted(pathlib.Path(json.__file__).parents[1].glob("*.py"))[:60]],
    trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ),
)
special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT, **special)
wrapped.chat_template = TEMPLATE
wrapped.save_pretrained(folder)
ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=len(wrapped),
    hidden_size=HIDDEN,
    intermediate_size=2 * HIDDEN,
    num_hidden_layers=LAYERS,
    num_attention_heads=HIDDEN // 32,
    num_key_value_heads=1,
    head_dim=32,  # the smallest that vLLM's attention takes on CPU
    max_position_embeddings=CONTEXT,
    tie_word_embeddings=False,
    initializer_range=0.2,
    **ids,
)
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
GenerationConfig(**ids).save_pretrained(folder)
