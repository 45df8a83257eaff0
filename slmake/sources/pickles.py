"""Pickle formats, which can run code when they are read: always refused."""

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def pickle_advice(name: str) -> str:
    """Why a pickled file is refused, and how to convert it."""
    return (
        f"{name}, a pickle format, which can run code when it is read. Convert it where you trust it: a model with "
        "`AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW, safe_serialization=True)`, a table with "
        "`pandas.read_pickle(FILE).to_json(NEW, orient='records', lines=True)`"
    )
