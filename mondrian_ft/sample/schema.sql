-- The tables of the service's job database, columns in the order in which real ones have them.

CREATE TABLE advisors (
    id TEXT PRIMARY KEY, name TEXT, bio TEXT, years TEXT, prompt TEXT, focus_areas TEXT,
    category TEXT, wikipedia_url TEXT, commons_url TEXT, prompt_type TEXT DEFAULT 'baseline'
);

CREATE TABLE config (key TEXT PRIMARY KEY, value TEXT);

CREATE TABLE jobs (
    id TEXT PRIMARY KEY,
    filename TEXT,
    advisor TEXT,
    thresholds TEXT,
    thinking INTEGER,
    status TEXT,
    analysis_file TEXT,
    current_step TEXT,
    analysis_markdown TEXT,
    llm_thinking TEXT,
    current_advisor INTEGER,
    total_advisors INTEGER,
    step_phase TEXT,
    llm_outputs TEXT,
    status_history TEXT,
    created_at TEXT DEFAULT CURRENT_TIMESTAMP,
    started_at TEXT,
    completed_at TEXT,
    type TEXT,
    analysis_markup TEXT,
    llm_prompt TEXT,
    prompt TEXT,
    last_activity TEXT DEFAULT CURRENT_TIMESTAMP,
    progress_percentage INTEGER DEFAULT 0,
    critical_recommendations TEXT,
    enable_rag INTEGER DEFAULT 0,
    mode TEXT DEFAULT 'baseline',
    error TEXT DEFAULT NULL,
    analysis_html TEXT DEFAULT NULL,
    advisor_bio TEXT DEFAULT NULL,
    summary_html TEXT DEFAULT NULL,
    advisor_bio_html TEXT DEFAULT NULL,
    retry_count INTEGER DEFAULT 0,
    model TEXT DEFAULT NULL,
    adapter TEXT DEFAULT NULL
);

CREATE TABLE advisor_usage (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    advisor_id TEXT,
    special_option_id TEXT,
    request_count INTEGER DEFAULT 0,
    last_used TEXT DEFAULT CURRENT_TIMESTAMP,
    FOREIGN KEY (advisor_id) REFERENCES advisors(id) ON DELETE SET NULL,
    FOREIGN KEY (special_option_id) REFERENCES special_options(id) ON DELETE SET NULL
);

CREATE TABLE focus_areas (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    advisor_id TEXT NOT NULL,
    title TEXT NOT NULL,
    description TEXT NOT NULL,
    sort_order INTEGER DEFAULT 0,
    FOREIGN KEY (advisor_id) REFERENCES advisors(id) ON DELETE CASCADE
);

CREATE TABLE special_options (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    description TEXT NOT NULL,
    is_active INTEGER DEFAULT 1,
    sort_order INTEGER DEFAULT 0
);

CREATE TABLE dimensional_profiles (
    id TEXT PRIMARY KEY,
    job_id TEXT,
    advisor_id TEXT NOT NULL,
    image_path TEXT NOT NULL,
    composition_score REAL,
    lighting_score REAL,
    focus_sharpness_score REAL,
    color_harmony_score REAL,
    subject_isolation_score REAL,
    depth_perspective_score REAL,
    visual_balance_score REAL,
    emotional_impact_score REAL,
    composition_comment TEXT,
    lighting_comment TEXT,
    focus_sharpness_comment TEXT,
    color_harmony_comment TEXT,
    subject_isolation_comment TEXT,
    depth_perspective_comment TEXT,
    visual_balance_comment TEXT,
    emotional_impact_comment TEXT,
    overall_grade TEXT,
    image_description TEXT,
    analysis_html TEXT,
    image_title TEXT,
    date_taken TEXT,
    location TEXT,
    image_significance TEXT,
    techniques TEXT,
    created_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP,
    embedding BLOB,
    UNIQUE(advisor_id, image_path)
);
