"""Texts that tokenizers often disagree on. They are counted by themselves: a user may never write such a text."""

HARD_TEXTS = (
    *(
        "cafe\u0301 a\u0308 n\u0303",
        "\u1e9b\u0323",
        "ﬁne Ⅳ ①",
        "𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
        "中文 日本語 한국어",
        "السلام עליכם",
        "ไม่เป็นไร",
    ),
    *(
        "👩\u200d👩\u200d👧 🏳️\u200d🌈",
        "🇩🇪🇫🇷 👍🏽",
        "a\u200bb\ufeffc",
        "\u00a0\u2003\u3000x",
        "tab\tnew\nline\r\n",
        "  two  spaces  ",
    ),
    *("\n\n\n", "<s></s><bos><eos><|endoftext|>", "<|im_start|>user\n<|im_end|>", "nul\0behind", "it's WE'LL I'm"),
    *("1234567890 3.14e-10 ½", "a" * 64),
)
