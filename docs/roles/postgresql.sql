-- Roles for a store in schema "pydedup" of this database. Run it in psql as who may create roles and
-- schemas, before the store is created or after; for another schema or other names, replace them.
--
--   pydedup_owner    creates the store, and migrates it when pydedup is upgraded
--   pydedup_writer   adds, removes, vacuums
--   pydedup_reader   serves, loads, verifies; can change nothing
--
-- Give pydedup_owner a password (\password pydedup_owner), and each user one of the other roles:
--   CREATE ROLE serving LOGIN IN ROLE pydedup_reader;

CREATE ROLE pydedup_owner LOGIN;
CREATE ROLE pydedup_writer;
CREATE ROLE pydedup_reader;

CREATE SCHEMA IF NOT EXISTS pydedup;
ALTER SCHEMA pydedup OWNER TO pydedup_owner;
GRANT USAGE ON SCHEMA pydedup TO pydedup_writer, pydedup_reader;

-- What pydedup_owner will create.
ALTER DEFAULT PRIVILEGES FOR ROLE pydedup_owner IN SCHEMA pydedup
  GRANT SELECT ON TABLES TO pydedup_reader;
ALTER DEFAULT PRIVILEGES FOR ROLE pydedup_owner IN SCHEMA pydedup
  GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO pydedup_writer;
ALTER DEFAULT PRIVILEGES FOR ROLE pydedup_owner IN SCHEMA pydedup
  GRANT USAGE ON SEQUENCES TO pydedup_writer;

-- What is there already.
GRANT SELECT ON ALL TABLES IN SCHEMA pydedup TO pydedup_reader;
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA pydedup TO pydedup_writer;
GRANT USAGE ON ALL SEQUENCES IN SCHEMA pydedup TO pydedup_writer;

-- From PostgreSQL 17 on, a writer's vacuum may also clean the tables at once; before, and without
-- this, autovacuum does.
DO $$
BEGIN
  IF current_setting('server_version_num')::int >= 170000 THEN
    EXECUTE 'ALTER DEFAULT PRIVILEGES FOR ROLE pydedup_owner IN SCHEMA pydedup '
      'GRANT MAINTAIN ON TABLES TO pydedup_writer';
    EXECUTE 'GRANT MAINTAIN ON ALL TABLES IN SCHEMA pydedup TO pydedup_writer';
  END IF;
END
$$;
