"""Many ranks: saves, restores and planning at several world sizes."""
