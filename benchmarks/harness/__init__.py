"""What every suite shares: the state that is saved, the raw-device ceiling, fresh processes, figures, reports."""
