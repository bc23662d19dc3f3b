"""No server: the engine in the program itself. Needs the extra `serve`."""

import sys

import memento_sgl
from memento_sgl.demo import MODEL_DIR

PROMPT = "<|im_start|>user\nDigit sum mod 100? a372 b91<|im_end|>\n<|im_start|>assistant\n"

if __name__ == "__main__":  # the engine's own processes import this file too
    model = sys.argv[1] if len(sys.argv) > 1 else str(MODEL_DIR)
    engine = memento_sgl.Engine(model_path=model, dtype="float32")
    answer = engine.generate(PROMPT, {"temperature": 0, "max_new_tokens": 400})
    print(answer["text"])
    print(answer["meta_info"]["memento"])
    engine.shutdown()
