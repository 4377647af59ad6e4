"""A small corpus and settings with which a retraining takes seconds, and rules of a gate that it passes."""

WORDS = {
    "en": "the ship left harbour court heard owner rain fell village letter engine market bread coast dawn",
    "tr": "gemi liman sabah mahkeme dinledi sahibi yagmur koy mektup motor pazar ekmek kiyi ayrildi okudu",
    "el": "πλοίο λιμάνι αυγή δικαστήριο άκουσε βροχή χωριό γράμμα μηχανή αγορά ψωμί ακτή",
}
SMALL = {
    "language_detector": "field", "original_languages": ["en"], "expanded_languages": ["tr"], "embedding_steps": 2,
    "embedding_dimension": 16, "instance_tokens": 32, "lory_segment": 16, "heldout_minimum": 4, "extension_experts": 3,
    "post_pretrain_steps": 3, "post_pretrain_warmup_steps": 1, "review_steps": 2, "review_warmup_steps": 1,
    "training_workers": 0, "evaluation_samples": 0, "report_resamples": 100,
    "retrain_documents": 20, "retrain_tokens": 100,
}  # fmt: skip
PASSES = ["bits_per_byte.expanded <= champion * 2", "retention.original >= 0.1"]
