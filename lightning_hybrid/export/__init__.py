"""Leave with a plain Hugging Face folder: weights, a tensor at a time, tokenizer and model card, or nothing."""

from lightning_hybrid.export.card import CardFacts, last_metrics, model_card
from lightning_hybrid.export.folder import RECORD, reason_to_keep, refuse_to_replace
from lightning_hybrid.export.model import Form, export_model, refuse_config, refuse_form

__all__ = [
    "RECORD",
    "CardFacts",
    "Form",
    "export_model",
    "last_metrics",
    "model_card",
    "reason_to_keep",
    "refuse_config",
    "refuse_form",
    "refuse_to_replace",
]
