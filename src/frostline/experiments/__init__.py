"""The two experiments of the essay: fine-tuning that overfits, and transfer with a new head."""
