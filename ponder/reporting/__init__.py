"""Tables, plots and pages out of finished runs. Reads only JSON and JSONL; neither jax nor a model is needed."""
