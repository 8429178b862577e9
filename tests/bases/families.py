"""What becomes of each type that transformers calls a causal language model, of which `docs/bases.md` is made.

Those that open are tried one by one in `test_bases.py`: that they go this way, for this reason.
"""

TREE = """
    afmoe apertus arcee aria_text axk1 beam biogpt bitnet cohere cohere2 cohere2_moe cohere_compass_text ctrl cwm dbrx
    deepseek_v2 deepseek_v3 diffllama dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo flint gemma gemma2
    gemma3_text gemma3n_text gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite gpt-sw3 gpt2 gpt_bigcode
    gpt_neox gpt_oss granite granite_swa granitemoe granitemoe_swa granitemoeshared helium hrm_text hunyuan_v1_dense
    hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1 laguna llama longcat_flash
    mellum mimo_v2_flash minicpm3 minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral moshi nanochat
    nemotron olmo olmo2 olmo3 olmoe opt persimmon phi phi3 phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_moe
    seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma youtu
""".split()
"""Computed as a tree of prefixes."""
_ROWS = {
    "it has no attention that transformers lets others compute": """
        bloom codegen falcon git gpt_neo gpt_neox_japanese gptj mpt openai-gpt rwkv trocr xglm xlstm
    """,
    "its layers' masks are of no known form": "blt doge",
    "it has compressed_sparse_attention layers": "deepseek_v4",
    "it has conv layers": "lfm2 lfm2_moe lfm3",
    "it has hybrid layers": "falcon_h1 zaya",
    "it has hybrid_sliding layers": "inkling2_text inkling_text",
    "it scales scores by a token's place in the row": "llama4_text",
    "it has indexed_attention layers": "axk2 deepseek_v32 dots3_note_text glm_moe_dsa hy_v4",
    "it has linear_attention layers": """
        bailing_hybrid bamba falcon_mamba granitemoehybrid jamba kimi_linear mamba mamba2 minimax nemotron_h olmo_hybrid
        qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp_text recurrent_gemma zamba zamba2
    """,
}
ROWS = {family: why for why, families in _ROWS.items() for family in families.split()}
"""Computed in rows by their own forward, and why."""
CLOSED = {
    "modernbert-decoder": "its output layer isn't given the last hidden state",
}
"""Decoder-only and not open."""
CACHE_OFF = ("blt", "moshi", "xlstm")
"""Families whose `generate` fails with their own cache, or then gives other tokens than their plain passes."""
_OTHERS = {
    "it attends to later tokens": """
        bert bert-generation big_bird camembert cpmant data2vec-text electra ernie megatron-bert reformer rembert
        roberta roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xlnet xmod
    """,
    "it is an encoder-decoder": """
        bart bigbird_pegasus blenderbot blenderbot-small marian mbart musicgen musicgen_melody mvp pegasus plbart
        prophetnet whisper
    """,
    "it joins several networks, whose text model is a type of its own": """
        dots3_note emu3 fuyu gemma3 gemma3n gemma4 gemma4_unified got_ocr2 llama4 mllama moss_transcribe_diarize
        qwen3_5 qwen3_5_moe qwen4_exp
    """,
    "it drafts for another network, whose states it reads": "gemma4_assistant gemma4_unified_assistant",
}
OTHERS = {family: why for why, families in _OTHERS.items() for family in families.split()}
"""Types that are no decoder-only language model by themselves, and what they are."""
